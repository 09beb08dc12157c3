// Curves as SVG, with the values under the pointer.
import { el } from "./lib.js";

export const COLOURS = ["#2f6fde", "#e07b39", "#1d8a55", "#8e5bd0", "#c0392b", "#00838f", "#8d6e00", "#5b6675"];
const WIDTH = 420, HEIGHT = 220, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 24;

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const short = (value) => {
  const size = Math.abs(value);
  if (size >= 1e4) return `${(value / 1000).toFixed(size >= 1e5 ? 0 : 1)}k`;
  return size && size < 0.01 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
};

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}

// lines: [{name, colour, dashed, points: [[step, value], ...]}]
export function chart(title, lines) {
  const xs = lines.flatMap((line) => line.points.map((point) => point[0])), ys = lines.flatMap((line) => line.points.map((point) => point[1]));
  let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  if (x0 === x1) x1 = x0 + 1;
  if (y0 === y1) { y0 -= Math.abs(y0) * 0.1 || 1; y1 += Math.abs(y1) * 0.1 || 1; }
  const x = (value) => LEFT + ((value - x0) / (x1 - x0)) * (WIDTH - LEFT - RIGHT), y = (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}: ${lines.map((line) => `${line.name} ends at ${short(line.points.at(-1)[1])}`).join("; ")}` });
  for (const value of ticks(y0, y1, 6)) root.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), stroke: "#e3e7ed" }), svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  for (const value of ticks(x0, x1, 4)) root.append(svg("text", { x: x(value), y: HEIGHT - 6, "text-anchor": "middle" }, short(value)));
  for (const line of lines) {
    const points = line.points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`);
    root.append(svg("polyline", { points: points.join(" "), fill: "none", stroke: line.colour, "stroke-width": 1.8, "stroke-dasharray": line.dashed ? "5 3" : "none" }));
    if (points.length < 3) for (const point of points) { const [a, b] = point.split(","); root.append(svg("circle", { cx: a, cy: b, r: 3, fill: line.colour })); }
  }
  const rule = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM, stroke: "#9aa4b2", visibility: "hidden" });
  root.append(rule);
  const words = el("p", { class: "hint" }, lines.map((line) => `${line.name}: ${short(line.points.at(-1)[1])}`).join(" · "));
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect(), step = x0 + ((((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT)) * (x1 - x0);
    const near = lines.map((line) => [line, line.points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best))]);
    rule.setAttribute("x1", x(near[0][1][0])); rule.setAttribute("x2", x(near[0][1][0])); rule.setAttribute("visibility", "visible");
    words.textContent = near.map(([line, point]) => `${line.name}: ${short(point[1])} at ${short(point[0])}`).join(" · ");
  });
  return el("figure", { class: "chart" }, el("figcaption", {}, el("b", {}, title)), root, words);
}
