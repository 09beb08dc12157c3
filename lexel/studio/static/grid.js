// A picture with its grid of cells over it: pointed at, painted on, walked with the arrow keys.
import { el } from "./lib.js";

// paint(pen, cell, x, y, w, h) draws over a cell; at(cell) is told where the pointer or cursor is; down(cell, dragging).
export function cellGrid({ rows, columns, cells, label, paint, at, down, up = () => {} }) {
  const side = Math.max(4, Math.floor(384 / Math.max(rows, columns)));
  const canvas = el("canvas", { class: "pixels", width: columns * side, height: rows * side, tabindex: "0", role: "application", "aria-label": label });
  const pen = canvas.getContext("2d");
  let cursor = 0, background = null, pressed = false;

  const draw = () => {
    pen.imageSmoothingEnabled = false;
    pen.clearRect(0, 0, canvas.width, canvas.height);
    if (background) pen.drawImage(background, 0, 0, canvas.width, canvas.height);
    for (let cell = 0; cell < cells; cell++) paint(pen, cell, (cell % columns) * side, Math.floor(cell / columns) * side, side, side);
    const x = (cursor % columns) * side, y = Math.floor(cursor / columns) * side;
    pen.lineWidth = 3; pen.strokeStyle = "#fff"; pen.strokeRect(x + 1.5, y + 1.5, side - 3, side - 3);
    pen.lineWidth = 1.5; pen.strokeStyle = "#16233b"; pen.strokeRect(x + 0.75, y + 0.75, side - 1.5, side - 1.5);
  };
  const move = (cell) => { cursor = Math.max(0, Math.min(cells - 1, cell)); at(cursor); draw(); };
  const cellOf = (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns), row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    return column < 0 || row < 0 || column >= columns || row >= rows ? null : Math.min(cells - 1, row * columns + column);
  };
  canvas.addEventListener("pointermove", (event) => {
    const cell = cellOf(event);
    if (cell === null || cell === cursor) return;
    move(cell);
    if (pressed) down(cell, true);
  });
  canvas.addEventListener("pointerdown", (event) => {
    const cell = cellOf(event);
    if (cell === null) return;
    canvas.setPointerCapture(event.pointerId);
    pressed = true;
    move(cell);
    down(cell, false);
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { if (pressed) up(); pressed = false; });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (step !== undefined) { const next = cursor + step; if (next >= 0 && next < cells) move(next); event.preventDefault(); }
    if (event.key === "Enter" || event.key === " ") { down(cursor, false); up(); event.preventDefault(); }
  });
  return {
    node: el("div", { class: "grid" }, canvas), canvas, draw, move,
    cursor: () => cursor,
    show: (address) => new Promise((done) => { const image = new Image(); image.onload = () => { background = image; draw(); done(); }; image.src = address; }),
  };
}
