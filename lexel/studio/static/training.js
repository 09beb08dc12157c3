// Curves of runs over each other, their pictures by step, and the verdicts on their codebooks; live while they train.
import { api, attempt, card, el, field, select, state } from "./lib.js";
import { COLOURS, chart } from "./chart.js";

const FIRST = ["psnr", "usage", "perplexity", "loss", "bits_per_token", "l1", "l2", "lpips"];
const EVERY = 4000; // milliseconds between looks at runs that go on

export async function open(root, models, alive) {
  const runs = models.filter((model) => model.run);
  if (!runs.length) { root.replaceChildren(card("Training", el("p", {}, "None of these models is a run with a log. Open a run's folder: lexel studio runs/mine"))); return undefined; }
  const names = runs.map((run) => run.key);
  const chosen = new Set((state.get("runs") || names.slice(0, 3).join(",")).split(",").filter((name) => names.includes(name)));
  const curves = el("div", {}), verdicts = el("div", {}), pictures = el("div", {});
  const colourOf = (name) => COLOURS[names.indexOf(name) % COLOURS.length];
  let last = "", timer = 0;

  const load = attempt(async () => {
    const found = await Promise.all([...chosen].map((name) => api(`models/${encodeURIComponent(name)}/training`)));
    const text = JSON.stringify(found);
    if (text !== last) { last = text; draw(found); }
    if (alive() && found.some((run) => run.steps && run.step < run.steps)) timer = setTimeout(load, EVERY);
  });
  const draw = (found) => {
    const all = [...new Set(found.flatMap((run) => Object.keys(run.curves)))];
    const place = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
    all.sort((a, b) => place(a) - place(b) || a.localeCompare(b));
    const shown = state.get("all") === "1" ? all : all.slice(0, 6);
    const more = el("button", { type: "button", onclick: () => { state.set({ all: state.get("all") === "1" ? null : 1 }); draw(found); } }, state.get("all") === "1" ? "Fewer curves" : `All ${all.length} curves`);
    curves.replaceChildren(card("Curves", el("p", { class: "hint" }, found.map((run) => `${run.key}: step ${run.step.toLocaleString("en")}${run.steps ? ` of ${run.steps.toLocaleString("en")}` : ""}, ${(run.seconds / 60).toFixed(1)} min`).join(" · "), ". Full lines: training; dashed: held out."),
      el("div", { class: "figures" }, shown.map((name) => chart(name.replaceAll("_", " "), found.flatMap((run) =>
        Object.entries(run.curves[name] || {}).filter(([, points]) => points.length).map(([part, points]) => ({ name: `${run.key}, ${part}`, colour: colourOf(run.key), dashed: part !== "training", points })))))),
      all.length > 6 && el("p", {}, more)));
    verdicts.replaceChildren(card("Is the codebook healthy?", found.map((run) => [el("h3", {}, run.key), run.findings.length ? run.findings.map((finding) => el("div", { class: `finding ${finding.level}` }, el("b", {}, `${finding.level}: ${finding.seen}`),
      finding.cause && el("div", {}, `Likely because ${finding.cause}.`), finding.change && el("div", {}, `Try this: ${finding.change}.`))) : el("p", { class: "hint" }, "This run has no codebook of its own, or no validation yet.")]).flat(2)));
    pictures.replaceChildren(...found.filter((run) => run.pictures.length).map(gallery));
  };
  const gallery = (run) => {
    const rows = el("div", {}), words = el("span", { class: "hint" });
    const slider = el("input", { type: "range", min: "0", max: String(run.pictures.length - 1), value: String(run.pictures.length - 1), "aria-label": `Step of the pictures of ${run.key}` });
    const show = attempt(async () => {
      const step = run.pictures[Number(slider.value)];
      words.textContent = `step ${step.toLocaleString("en")}`;
      const found = await api(`models/${encodeURIComponent(run.key)}/training/${step}`);
      rows.replaceChildren(...Object.entries(found.rows).map(([name, list]) => el("div", {}, el("span", { class: "hint" }, name), el("div", { class: "strip" }, list.map((source) => el("img", { class: "pixels", src: source, alt: name }))))));
    });
    slider.addEventListener("change", show);
    show();
    return card(`Pictures of ${run.key}`, el("div", { class: "controls" }, run.pictures.length > 1 && field("Step", slider), words), rows);
  };
  const boxes = runs.map((run) => {
    const box = el("input", { type: "checkbox", checked: chosen.has(run.key), onchange: () => {
      if (box.checked) chosen.add(run.key); else chosen.delete(run.key);
      state.set({ runs: [...chosen].join(",") });
      clearTimeout(timer);
      load();
    } });
    const mark = el("i", {});
    mark.style.background = colourOf(run.key);
    return el("label", { class: "check" }, box, el("span", { class: "legend" }, el("span", {}, mark, run.key)));
  });
  root.replaceChildren(card("Runs", el("div", { class: "controls" }, boxes)), curves, verdicts, pictures);
  await load();
  return () => clearTimeout(timer);
}
