// Tokens of a picture under the pointer: what each is, and what the picture becomes when they are changed.
import { api, attempt, card, chosenAmong, colour, el, facts, field, modelPicker, patch, percent, picturePicker, post, reconstruct, select, state, tokenizersAmong } from "./lib.js";
import { cellGrid } from "./grid.js";

export async function open(root, models) {
  const tokenizers = tokenizersAmong(models);
  const key = chosenAmong(tokenizers);
  const about = await facts(key);
  if (about.continuous) throw new Error(`${key} has no codebook: its tokens are continuous; choose another tokenizer`);
  let chosen = { example: Math.min(Number(state.get("example", "0")) || 0, about.examples - 1) };
  const work = el("div", {});
  let editor = null;
  const load = attempt(async () => {
    const result = await reconstruct(key, chosen, false);
    editor = edit(key, result, work, chosen.file ? "" : state.get("edits"));
  });
  root.replaceChildren(card("The tokens of a picture",
    el("div", { class: "controls" }, modelPicker("Tokenizer", tokenizers, key, (value) => {
      state.set({ model: value, edits: null, book: null });
      open(root, models);
    })),
    picturePicker(key, about.examples, chosen.example, (given) => {
      chosen = given;
      state.set({ example: given.example, edits: null });
      load();
    })), work);
  const keys = (event) => {
    if (!editor || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
    if ((event.ctrlKey || event.metaKey) && event.key === "z") { event.preventDefault(); editor.undo(); }
  };
  document.addEventListener("keydown", keys);
  await load();
  return () => document.removeEventListener("keydown", keys);
}

// Edits in the address: "12.45_13.7" puts code 45 at place 12 and code 7 at place 13.
const readEdits = (text) => text.split("_").map((part) => part.split(".").map(Number)).filter(([at, code]) => Number.isInteger(at) && Number.isInteger(code));

function edit(key, result, work, edits) {
  const { layout } = result, original = [...result.indices], tokens = [...original];
  for (const [at, code] of readEdits(edits)) if (at >= 0 && at < tokens.length && code >= 0 && code < result.codebook_size) tokens[at] = code;
  const history = [];
  let book = Math.min(Number(state.get("book", "0")) || 0, layout.books - 1);
  let brush = null, swapped = null, mode = "paint", stroke = null, sent = 0, codeTurn = 0, timer = 0;
  const place = (cell) => book * layout.cells + cell;
  const picture = el("img", { class: "pixels", alt: "The picture of these tokens", src: result.reconstruction });
  const panel = el("div", { class: "about", "aria-live": "polite" }, el("p", { class: "hint" }, "Point at a token, or walk with the arrow keys."));
  const undoButton = el("button", { type: "button", onclick: () => undo() }, "Undo");
  const brushBox = el("span", { class: "hint" }, "no code picked yet: pick one at the right, or with P");
  const changed = el("span", { class: "hint", "data-changed": "0" });

  const decode = attempt(async () => {
    const turn = ++sent;
    const found = await post(`models/${encodeURIComponent(key)}/decode`, { indices: tokens, shape: layout.shape });
    if (turn === sent) { picture.src = found.picture; if (layout.spatial) await grid.show(found.picture); }
  });
  const note = () => {
    const differing = tokens.flatMap((code, at) => (code === original[at] ? [] : [`${at}.${code}`]));
    state.set({ edits: differing.length && differing.length <= 300 ? differing.join("_") : null });
    changed.textContent = `${differing.length} changed`;
    changed.dataset.changed = differing.length;
    undoButton.disabled = !history.length;
  };
  const put = (at, code) => {
    if (tokens[at] === code) return;
    (stroke ??= []).push([at, tokens[at]]);
    tokens[at] = code;
    grid.draw();
    clearTimeout(timer);
    timer = setTimeout(decode, 60);
  };
  const finish = () => { if (stroke) { history.push(stroke); stroke = null; } note(); };
  const undo = () => {
    const last = history.pop();
    if (!last) return;
    for (const [at, code] of last.reverse()) tokens[at] = code;
    grid.draw(); note(); decode();
  };
  const pickBrush = (code) => {
    brush = code; mode = "paint";
    brushBox.textContent = `painting with code ${code}`;
    modes();
  };
  const show = (cell) => {
    const code = tokens[place(cell)], turn = ++codeTurn;
    setTimeout(attempt(async () => {
      if (turn !== codeTurn) return;
      const found = await codeFacts(key, code, book);
      if (turn === codeTurn) panel.replaceChildren(describe(found, cell, layout, (other) => { pickBrush(other); }, () => { put(place(cell), brush ?? code); finish(); }));
    }), 60);
  };
  const grid = cellGrid({
    rows: layout.rows, columns: layout.columns, cells: layout.cells,
    label: `Tokens, ${layout.rows} by ${layout.columns}. Arrow keys walk, P picks a code, Enter paints it.`,
    paint(pen, cell, x, y, w, h) {
      const at = place(cell);
      pen.globalAlpha = layout.spatial ? overlay.value / 100 : 1;
      pen.fillStyle = colour(tokens[at]);
      pen.fillRect(x, y, w, h);
      pen.globalAlpha = 1;
      if (tokens[at] !== original[at]) { pen.fillStyle = "#c0392b"; pen.fillRect(x + w - w / 4, y, w / 4, h / 4); }
      if (cell === swapped) { pen.strokeStyle = "#f5a623"; pen.lineWidth = 4; pen.strokeRect(x + 2, y + 2, w - 4, h - 4); }
    },
    at: show,
    down(cell, dragging) {
      if (mode === "pick") { if (!dragging) pickBrush(tokens[place(cell)]); return; }
      if (mode === "swap") {
        if (dragging) return;
        if (swapped === null) { swapped = cell; grid.draw(); return; }
        const [a, b] = [tokens[place(swapped)], tokens[place(cell)]];
        put(place(swapped), b); put(place(cell), a);
        swapped = null; grid.draw(); show(cell);
        return;
      }
      if (brush === null) { pickBrush(tokens[place(cell)]); return; }
      put(place(cell), brush);
    },
    up: finish,
  });
  grid.canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey) return;
    if (event.key === "p") pickBrush(tokens[place(grid.cursor())]);
    if (event.key === "u") undo();
    if (event.key === "s") { mode = "swap"; modes(); }
  });
  const overlay = el("input", { type: "range", min: "0", max: "100", value: "35", "aria-label": "Strength of the colours", oninput: () => grid.draw() });
  const buttons = el("div", { class: "controls", role: "group", "aria-label": "What a click does" });
  const modes = () => buttons.replaceChildren(
    ...[["paint", "Paint"], ["pick", "Pick"], ["swap", "Swap two"]].map(([name, text]) =>
      el("button", { type: "button", "aria-pressed": String(mode === name), onclick: () => { mode = name; swapped = null; modes(); grid.draw(); } }, text)),
    undoButton,
    el("button", { type: "button", onclick: () => {
      stroke = tokens.flatMap((code, at) => (code === original[at] ? [] : [[at, code]]));
      original.forEach((code, at) => { tokens[at] = code; });
      if (!stroke.length) stroke = null;
      grid.draw(); finish(); decode();
    } }, "Reset"), brushBox, changed);
  modes();
  work.replaceChildren(card("", buttons,
    el("div", { class: "controls" },
      layout.books > 1 && field("Book", select([...Array(layout.books).keys()].map((n) => [n, `book ${n + 1} of ${layout.books}`]), book, (value) => { book = Number(value); state.set({ book }); grid.draw(); })),
      layout.spatial && field("Colours over the picture", overlay)),
    el("div", { class: "work" },
      el("figure", {}, el("figcaption", {}, el("b", {}, "Tokens"), ` ${layout.cells}, red corner: changed`), grid.node),
      el("figure", {}, el("figcaption", {}, el("b", {}, "What they decode to")), picture),
      panel)));
  note();
  grid.draw();
  if (layout.spatial) grid.show(result.reconstruction);
  if (history.length === 0 && changed.dataset.changed !== "0") decode();
  return { undo };
}

const known = new Map();
function codeFacts(key, code, book) {
  const name = `${key}/${book}/${code}`;
  if (!known.has(name)) known.set(name, api(`models/${encodeURIComponent(key)}/codes/${code}?book=${book}`).catch((error) => { known.delete(name); throw error; }));
  return known.get(name);
}

export function describe(found, cell, layout, use, put) {
  const count = found.nearest.length + 1;
  return el("div", {},
    el("div", { class: "controls" }, el("div", { class: "big" }, patch(found.sheet, 0, count, 1)),
      el("div", {}, el("b", {}, `Code ${found.code}`), cell === null ? "" : el("div", { class: "hint" }, `row ${Math.floor(cell / layout.columns) + 1}, column ${(cell % layout.columns) + 1}`))),
    el("dl", {}, el("dt", {}, "used"), el("dd", {}, `${found.count.toLocaleString("en")} times, ${percent(found.share)}`),
      el("dt", {}, "rank"), el("dd", {}, `${found.rank.toLocaleString("en")} of ${found.size.toLocaleString("en")}`)),
    el("p", { class: "hint" }, "Nearest codes", put ? "; click one to paint with it" : "; click one to see it"),
    el("div", { class: "codes small" }, found.nearest.map((near, at) =>
      el("button", { type: "button", title: `code ${near.code}, distance ${near.distance}`, "aria-label": `Code ${near.code}, distance ${near.distance}`, onclick: () => use && use(near.code) },
        patch(found.sheet, at + 1, count, 1), el("small", {}, String(near.code))))),
    put && el("p", {}, el("button", { type: "button", onclick: put }, "Paint here")));
}
