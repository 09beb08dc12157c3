// New pictures of a class; parts of a picture made anew: by a painted mask, or from its upper half.
import { api, attempt, card, chosenAmong, el, facts, field, modelPicker, pause, picturePicker, post, reconstruct, select, state } from "./lib.js";
import { cellGrid } from "./grid.js";

export async function open(root, models, alive) {
  const generators = models.filter((model) => model.kind === "generator");
  if (!generators.length) {
    root.replaceChildren(card("Generate", el("p", {}, "There is no generator here. Train one over a tokenizer's tokens, then open the studio on both:"),
      el("pre", {}, "lexel demo --out runs/demo\nlexel studio runs/demo")));
    return undefined;
  }
  const key = chosenAmong(generators);
  const model = `models/${encodeURIComponent(key)}`;
  const about = await facts(key);
  const number = (name, value, min, max, step) => {
    const input = el("input", { type: "number", min: String(min), max: String(max), step: String(step), value: state.get(name) || String(value), onchange: () => state.set({ [name]: input.value }) });
    return input;
  };
  const controls = {
    cfg_scale: number("cfg_scale", about.guided ? 2 : 1, 0, 20, 0.1), temperature: number("temperature", 1, 0.01, 5, 0.05),
    top_p: number("top_p", 0.96, 0.01, 1, 0.01), seed: number("seed", 0, 0, 2 ** 31 - 1, 1), count: number("count", 4, 1, 16, 1),
  };
  const label = select(about.classes.map((name, at) => [at, name]), state.get("class", "0"), (value) => state.set({ class: value }));
  const caption = el("input", { type: "text", class: "caption", maxlength: "1000", placeholder: "a lighthouse at dusk", value: state.get("caption"), onchange: () => state.set({ caption: caption.value }), onkeydown: (event) => { if (event.key === "Enter" && !go.disabled) run(); } });
  const go = el("button", { type: "button", class: "main", onclick: () => run() }, "Generate");
  const stop = el("button", { type: "button", disabled: true }, "Stop");
  const bar = el("progress", { max: "1", value: "0", "aria-label": "Progress" });
  const words = el("p", { class: "hint", role: "status" }, " ");
  const samples = el("div", { class: "samples" });
  let given = null, running = null;

  const run = attempt(async () => {
    const options = { class: label.value || "0", caption: caption.value, given: given ? given() : null };
    for (const [name, input] of Object.entries(controls)) options[name] = Number(input.value);
    go.disabled = true;
    try {
      let job = await post(`${model}/generate`, options);
      running = job.number;
      stop.disabled = false;
      stop.onclick = attempt(() => api(`jobs/${job.number}`, { method: "DELETE" }));
      while (job.state === "running" && alive()) {
        await pause(250);
        job = await api(`jobs/${job.number}`);
        bar.value = job.total ? job.done / job.total : 0;
        words.textContent = `${job.done} of ${job.total || "?"} tokens`;
        if (job.preview) draw(job.preview.images, job.preview.free);
      }
      if (job.state === "failed") throw new Error(job.error);
      if (job.state === "done") draw(job.result.images, []);
      words.textContent = { done: `done in ${job.seconds} s`, stopped: "stopped" }[job.state] || "";
      bar.value = job.state === "done" ? 1 : 0;
    } finally { running = null; go.disabled = false; stop.disabled = true; }
  });
  // Places without a token yet are veiled.
  const draw = (images, free) => samples.replaceChildren(...images.map((source, at) => {
    const shown = el("img", { class: "pixels", alt: `Sample ${at + 1}`, src: source });
    if (!free.some(Boolean)) return shown;
    const box = el("div", { class: "grid" }, shown), veil = el("canvas", { class: "pixels", width: about.layout.columns, height: about.layout.rows });
    Object.assign(veil.style, { position: "absolute", inset: "0", height: "100%", background: "none" });
    const pen = veil.getContext("2d");
    pen.fillStyle = "#eef1f5";
    free.forEach((is, cell) => { if (is) pen.fillRect(cell % about.layout.columns, Math.floor(cell / about.layout.columns), 1, 1); });
    box.append(veil);
    return box;
  }));

  const names = { cfg_scale: "Guidance", temperature: "Temperature", top_p: "Top p", seed: "Seed", count: "How many" };
  const mask = el("div", {});
  root.replaceChildren(
    card("New pictures", el("p", { class: "hint" }, `${about.family}, ${about.parameters.toLocaleString("en")} parameters, condition: ${about.condition}`),
      el("div", { class: "controls" }, generators.length > 1 && modelPicker("Generator", generators, key, (value) => { state.set({ model: value }); open(root, models, alive); }),
        about.classes.length > 0 && field("Class", label), about.captions && field("Caption", caption),
        ...Object.entries(controls).filter(([name]) => name !== "cfg_scale" || about.guided).map(([name, input]) => field(names[name], input)), go, stop),
      bar, words, samples),
    about.continuous || !about.layout.spatial || about.layout.books > 1 ? "" : card("Keep a part of a picture", el("p", { class: "hint" }, "Choose a picture, then paint over what is to be made anew, or keep its upper half. Generate fills in the rest."),
      picturePicker(key, about.examples, null, attempt(async (chosen) => { given = await masked(key, chosen, mask, () => { given = null; }); })), mask));
  return () => { if (running) api(`jobs/${running}`, { method: "DELETE" }).catch(() => {}); };
}

async function masked(key, chosen, box, drop) {
  const result = await reconstruct(key, chosen, false);
  const { rows, columns, cells } = result.layout;
  const free = new Array(cells).fill(false);
  let value = true;
  const grid = cellGrid({
    rows, columns, cells, label: "Mask: arrow keys walk, Enter marks what is made anew.",
    paint(pen, cell, x, y, w, h) { if (free[cell]) { pen.fillStyle = "#2f6fdec0"; pen.fillRect(x, y, w, h); } },
    at() {},
    down(cell, dragging) { if (!dragging) value = !free[cell]; free[cell] = value; grid.draw(); note(); },
  });
  const words = el("p", { class: "hint", role: "status" });
  const note = () => { words.textContent = `${free.filter(Boolean).length} of ${cells} tokens are made anew`; };
  const fill = (rule) => () => { for (let cell = 0; cell < cells; cell++) free[cell] = rule(cell); grid.draw(); note(); };
  const wide = el("div", { class: "side two" }, el("figure", {}, el("figcaption", {}, el("b", {}, "Mask"), " blue is made anew"), grid.node),
    el("figure", {}, el("figcaption", {}, el("b", {}, "The picture")), el("img", { class: "pixels", alt: "The picture", src: result.reconstruction })));
  box.replaceChildren(el("div", { class: "controls" },
    el("button", { type: "button", onclick: fill((cell) => Math.floor(cell / columns) >= rows / 2) }, "Keep the upper half"),
    el("button", { type: "button", onclick: fill((cell) => { const r = Math.floor(cell / columns), c = cell % columns; return r >= rows / 4 && r < rows * 0.75 && c >= columns / 4 && c < columns * 0.75; }) }, "Renew the middle"),
    el("button", { type: "button", onclick: fill(() => false) }, "Clear"),
    el("button", { type: "button", onclick: () => { box.replaceChildren(); drop(); } }, "Without a picture")), wide, words);
  await grid.show(result.reconstruction);
  fill((cell) => Math.floor(cell / columns) >= rows / 2)();
  return () => result.indices.map((code, cell) => (free[cell] ? -1 : code));
}
