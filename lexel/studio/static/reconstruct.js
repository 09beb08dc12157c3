// A picture through one tokenizer or two: original, reconstruction, error, tokens, numbers, a wipe.
import { attempt, card, chosenAmong, colour, el, facts, modelPicker, picture, picturePicker, reconstruct, state, tokenizersAmong } from "./lib.js";

export async function open(root, models) {
  const tokenizers = tokenizersAmong(models);
  const key = () => chosenAmong(tokenizers), other = () => chosenAmong(tokenizers, "with", "");
  const about = await facts(key());
  let chosen = { example: Math.min(Number(state.get("example", "0")) || 0, about.examples - 1) };
  const results = el("div", {});

  const run = attempt(async () => {
    results.setAttribute("aria-busy", "true");
    try {
      const whole = state.get("whole") === "1";
      const keys = [key(), ...(other() ? [other()] : [])];
      const found = [];
      for (const name of keys) found.push([name, await reconstruct(name, chosen, whole)]);
      results.replaceChildren(...shown(found));
    } finally { results.removeAttribute("aria-busy"); }
  });
  const change = (values) => { state.set(values); run(); };
  const whole = el("input", { type: "checkbox", checked: state.get("whole") === "1", onchange: () => change({ whole: whole.checked ? 1 : null }) });
  root.replaceChildren(card("A picture through the vocabulary and back",
    el("div", { class: "controls" },
      modelPicker("Tokenizer", tokenizers, key(), (value) => change({ model: value })),
      tokenizers.length > 1 && modelPicker("beside", tokenizers, other(), (value) => change({ with: value }), "none"),
      el("label", { class: "check" }, whole, "whole picture")),
    picturePicker(key(), about.examples, chosen.example, (given) => {
      chosen = given;
      change({ example: given.example });
    })), results);
  await run();
}

function shown(found) {
  const parts = found.map(([name, result]) => card(found.length > 1 ? name : "",
    el("div", { class: "side" },
      picture(result.original, "Original", `${result.width} × ${result.height}`),
      picture(result.reconstruction, "Reconstruction"),
      picture(result.errors, "Error", "bright: 64 levels or more"),
      result.indices && tokenMap(result)),
    numbers(result)));
  const [[first, a], second] = found;
  const same = second && second[1].width === a.width && second[1].height === a.height;
  parts.push(card(same ? "One against the other" : "Before and after", el("p", { class: "hint" }, "Drag, or use the arrow keys."),
    same ? wipe(a.reconstruction, first, second[1].reconstruction, second[0]) : wipe(a.original, "original", a.reconstruction, "reconstruction")));
  return parts;
}

function numbers(result) {
  const units = { PSNR: " dB", "mean error": " of 255" };
  const list = Object.entries(result.numbers).map(([name, value]) => [name, value === null ? "∞" : `${value}${units[name] || ""}`]);
  if (result.indices) list.push(["tokens", result.indices.length], ["distinct", result.distinct], ["bits a picture", result.layout.bits]);
  list.push(["seconds", result.seconds]);
  return el("ul", { class: "numbers" }, list.map(([name, value]) => el("li", {}, el("b", {}, String(value)), name)));
}

function tokenMap(result) {
  const { rows, columns, cells } = result.layout;
  const canvas = el("canvas", { class: "pixels", width: columns, height: rows, role: "img", "aria-label": `Tokens, ${result.distinct} distinct codes` });
  const pen = canvas.getContext("2d");
  for (let cell = 0; cell < cells; cell++) {
    pen.fillStyle = colour(result.indices[cell]);
    pen.fillRect(cell % columns, Math.floor(cell / columns), 1, 1);
  }
  return el("figure", {}, el("figcaption", {}, el("b", {}, "Tokens"), " one colour a code"), canvas);
}

function wipe(left, leftName, right, rightName) {
  const top = el("img", { class: "pixels top", src: left, alt: leftName });
  const line = el("span", { class: "line" });
  const slider = el("input", { type: "range", min: "0", max: "100", value: "50", "aria-label": `${leftName} against ${rightName}`, oninput: () => move() });
  const move = () => { top.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`; line.style.left = `calc(${slider.value}% - 1.5px)`; };
  move();
  return el("div", { class: "wipe" }, el("img", { class: "pixels", src: right, alt: rightName }), top, slider, line,
    el("i", { class: "a" }, leftName), el("i", { class: "b" }, rightName));
}
