// Results of `lexel evaluate` and `lexel compare`: those on one scale in one table, sorted by a click on its head.
import { api, card, el } from "./lib.js";

export async function open(root) {
  const { boards, comparisons } = await api("results");
  if (!boards.length && !comparisons.length) {
    root.replaceChildren(card("Results", el("p", {}, "No results are open. Measure models, then open the studio on the files, or on the folder of a comparison:"),
      el("pre", {}, "lexel evaluate runs/a --data PICTURES --json a.json\nlexel compare RECIPE --quantizers ibq,vq --out runs/compared\nlexel studio runs/a a.json runs/compared")));
    return;
  }
  root.replaceChildren(...boards.map(boardCard), ...comparisons.map((found) => card(`Comparison ${found.name}`,
    el("p", { class: "hint" }, `${found.runs} runs that differ in the quantizer alone; means and deviations over seeds.`), sheet(found.head.map((text) => ({ text })), found.rows.map((row) => row.map((text) => ({ text })))))));
}

function boardCard(board) {
  const best = new Map();
  for (const metric of board.metrics) {
    const values = board.rows.map((row) => row.values[metric.name]?.value).filter((value) => typeof value === "number");
    if (new Set(values).size > 1) best.set(metric.name, metric.higher ? Math.max(...values) : Math.min(...values));
  }
  const head = [{ text: "" }, { text: "bits a picture" }, ...board.metrics.map((metric) => ({ text: `${title(metric.name)} ${metric.higher ? "↑" : "↓"}` }))];
  const rows = board.rows.map((row) => [{ text: row.name }, { text: row.bits === null ? "–" : Math.round(row.bits).toLocaleString("en") },
    ...board.metrics.map((metric) => cell(row.values[metric.name], best.get(metric.name)))]);
  return card(board.set ? `${board.set}, protocol ${board.protocol}` : `Protocol ${board.protocol}`,
    el("p", { class: "hint" }, `${board.images.toLocaleString("en")} images, measured alike. `, board.apart && `Not beside the first table: ${board.apart}.`),
    sheet(head, rows), el("details", {}, el("summary", {}, "What measured them"), sheet([{ text: "" }, ...board.code.map((text) => ({ text }))], board.rows.map((row) => [{ text: row.name }, ...row.code.map((text) => ({ text, soft: true }))]))),
    board.warnings.length > 0 && el("details", {}, el("summary", {}, `${board.warnings.length} remarks`), el("ul", {}, board.warnings.map((text) => el("li", {}, text)))));
}

const NAMES = { psnr: "PSNR", ssim: "SSIM", l1: "L1", lpips_vgg: "LPIPS (VGG)", lpips_alex: "LPIPS (AlexNet)", dists: "DISTS", fid: "FID", kid: "KID", inception_score: "inception score" };
const title = (name) => NAMES[name] || name.replace(/^fd_/, "Fréchet, ").replaceAll("_", " ");
const cell = (found, best) => (found ? { text: short(found.value), value: found.value, best: found.value === best, title: found.low === null ? "" : `${short(found.low)} to ${short(found.high)} (95 %)`, spread: found.low === null ? "" : `± ${short((found.high - found.low) / 2)}` } : { text: "–" });
const short = (value) => (Math.abs(value) >= 1e5 ? value.toExponential(2) : Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 }));

function sheet(head, rows) {
  const body = el("tbody", {});
  let by = -1, down = false;
  const key = (row) => row[by].value ?? (Number.isNaN(parseFloat(row[by].text.replaceAll(",", ""))) ? row[by].text : parseFloat(row[by].text.replaceAll(",", "")));
  const draw = () => {
    const sorted = by < 0 ? rows : [...rows].sort((a, b) => { const [x, y] = [key(a), key(b)]; return (typeof x === typeof y ? (x > y ? 1 : x < y ? -1 : 0) : typeof x === "number" ? -1 : 1) * (down ? -1 : 1); });
    body.replaceChildren(...sorted.map((row) => el("tr", {}, row.map((each, at) => el(at ? "td" : "th", { class: [each.best && "best", each.soft && "soft"].filter(Boolean).join(" ") || undefined, title: each.title || undefined, scope: at ? undefined : "row" }, each.text, each.spread && el("small", {}, ` ${each.spread}`))))));
    heads.forEach((node, at) => node.setAttribute("aria-sort", at === by ? (down ? "descending" : "ascending") : "none"));
  };
  const heads = head.map((each, at) => el("th", { scope: "col" }, el("button", { type: "button", class: "sort", onclick: () => { down = at === by ? !down : each.text.includes("↑"); by = at; draw(); } }, each.text || "name")));
  draw();
  return el("div", { class: "scroll" }, el("table", { class: "results" }, el("thead", {}, el("tr", {}, heads)), body));
}
