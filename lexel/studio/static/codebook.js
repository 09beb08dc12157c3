// Every code as the patch it decodes to, sorted by use; dead codes; codes and latents in the plane.
import { api, attempt, card, chosenAmong, el, facts, field, long, modelPicker, patch, percent, select, state, tokenizersAmong } from "./lib.js";
import { describe } from "./tokens.js";

export async function open(root, models) {
  const tokenizers = tokenizersAmong(models);
  const key = chosenAmong(tokenizers);
  const model = `models/${encodeURIComponent(key)}`;
  const about = await facts(key);
  const list = el("div", {}), detail = el("div", { class: "about", "aria-live": "polite" }), map = el("div", {});
  const settings = () => ({ page: Number(state.get("page", "0")) || 0, order: state.get("order") || "use", book: Number(state.get("book", "0")) || 0 });

  const pick = attempt(async (code) => {
    state.set({ code });
    const found = await api(`${model}/codes/${code}?book=${settings().book}`);
    detail.replaceChildren(card(`Code ${code}`, describe(found, null, about.layout, pick, null)));
    if (map.childElementCount) detail.scrollIntoView({ block: "nearest", behavior: "smooth" }); // chosen by hand, perhaps far above
  });
  const load = attempt(async () => {
    const { page, order, book } = settings();
    list.replaceChildren(el("p", { class: "loading" }, "Decoding the codes…"));
    let found;
    try { found = await long(`${model}/codes?page=${page}&order=${order}&book=${book}`, "Decoding the codes…"); }
    catch (error) { list.replaceChildren(); throw error; }
    const rows = Math.ceil(found.codes.length / 16);
    const turn = (by) => { state.set({ page: page + by || null }); load(); };
    list.replaceChildren(card("",
      el("ul", { class: "numbers" },
        el("li", {}, el("b", {}, percent(found.used / found.size)), "in use"),
        el("li", {}, el("b", {}, found.used.toLocaleString("en")), `of ${found.size.toLocaleString("en")} codes`),
        el("li", {}, el("b", {}, (found.size - found.used).toLocaleString("en")), "dead"),
        el("li", {}, el("b", {}, found.tokens.toLocaleString("en")), found.pictures === null ? "tokens of the run's held-out pictures counted" : `tokens of ${found.pictures} pictures counted`)),
      bars(found.histogram),
      el("div", { class: "controls" },
        field("Order", select([["use", "by use"], ["number", "by number"], ["dead", "dead codes only"]], order, (value) => { state.set({ order: value, page: null }); load(); })),
        found.books > 1 && field("Book", select([...Array(found.books).keys()].map((n) => [n, `book ${n + 1}`]), book, (value) => { state.set({ book: value, page: null }); load(); drawMap(); })),
        el("button", { type: "button", disabled: page === 0, onclick: () => turn(-1) }, "Earlier"),
        el("span", { class: "hint" }, `page ${page + 1} of ${found.pages}`),
        el("button", { type: "button", disabled: page + 1 >= found.pages, onclick: () => turn(1) }, "Later")),
      found.codes.length ? el("div", { class: "codes" }, found.codes.map((code, at) =>
        el("button", { type: "button", class: found.counts[at] ? "" : "dead", title: `code ${code}, used ${found.counts[at]} times`, "aria-label": `Code ${code}, used ${found.counts[at]} times`, onclick: () => pick(code) },
          patch(found.sheet, at, 16, rows)))) : el("p", {}, "No dead codes: every code was chosen at least once.")));
  });
  const drawMap = attempt(async () => {
    const found = await long(`${model}/map?book=${settings().book}`, "Placing the codes…");
    map.replaceChildren(card("Codes and latents", el("p", { class: "hint" }, "On their two main axes. Blue: codes in use; grey: dead codes; orange: latents of the examples. Click a code."), scatter(found, pick)));
  });
  root.replaceChildren(card("The codebook",
    el("div", { class: "controls" }, modelPicker("Tokenizer", tokenizers, key, (value) => { state.set({ model: value, page: null, code: null, book: null }); open(root, models); })),
    el("p", {}, about.continuous ? "" : `${about.quantizer}, ${about.codebook_size.toLocaleString("en")} codes. Each code is shown as the patch it decodes to among its like.`)), list, el("div", { class: "pair" }, map, detail));
  if (about.continuous) throw new Error(`${key} has no codebook: its tokens are continuous; choose another tokenizer`);
  await load();
  if (state.get("code")) await pick(Number(state.get("code")));
  await drawMap();
}

function bars(counts) {
  const canvas = el("canvas", { class: "pixels", width: counts.length, height: 40, role: "img", "aria-label": "Use of the codes, most used first" });
  canvas.style.height = "56px";
  const pen = canvas.getContext("2d"), most = Math.log1p(Math.max(...counts, 1));
  pen.fillStyle = "#2f6fde";
  counts.forEach((count, at) => { const height = (Math.log1p(count) / most) * 40; pen.fillRect(at, 40 - height, 1, height); });
  return el("figure", {}, el("figcaption", {}, "how often each code is used, the most used first (logarithmic)"), canvas);
}

function scatter(found, pick) {
  const size = 640, margin = 14, all = [...found.latents, ...found.points];
  const [x0, x1] = [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
  const [y0, y1] = [Math.min(...all.map((p) => p[1])), Math.max(...all.map((p) => p[1]))];
  const at = ([x, y]) => [margin + ((x - x0) / (x1 - x0 || 1)) * (size - 2 * margin), size - margin - ((y - y0) / (y1 - y0 || 1)) * (size - 2 * margin)];
  const canvas = el("canvas", { width: size, height: size, role: "img", "aria-label": "Map of codes and latents" });
  Object.assign(canvas.style, { width: "100%", maxWidth: "640px", height: "auto", background: "#fff", borderRadius: "8px", cursor: "pointer" });
  const pen = canvas.getContext("2d");
  const dot = (point, radius, colour) => { const [x, y] = at(point); pen.fillStyle = colour; pen.beginPath(); pen.arc(x, y, radius, 0, 7); pen.fill(); };
  found.latents.forEach((point) => dot(point, 2.2, "#e07b3966"));
  found.points.forEach((point, n) => dot(point, 3.2, found.counts[n] ? "#2f6fdeb0" : "#9aa4b2a0"));
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * size, y = ((event.clientY - box.top) / box.height) * size;
    let best = -1, least = 20 ** 2;
    found.points.forEach((point, n) => { const [a, b] = at(point), d = (a - x) ** 2 + (b - y) ** 2; if (d < least) { least = d; best = n; } });
    if (best >= 0) pick(found.codes[best]);
  });
  return canvas;
}
