// The frame: which view is open, and for which models.
import { attempt, el, state, studio, tell } from "./lib.js";
import * as reconstruct from "./reconstruct.js";
import * as tokens from "./tokens.js";
import * as codebook from "./codebook.js";
import * as generate from "./generate.js";
import * as training from "./training.js";
import * as results from "./results.js";

const VIEWS = { reconstruct, tokens, codebook, generate, training, results };
const NAMES = { reconstruct: "Reconstruct", tokens: "Tokens", codebook: "Codebook", generate: "Generate", training: "Training", results: "Results" };
let close = () => {};
let turn = 0;

const show = attempt(async () => {
  const { models, start } = await studio();
  const name = state.view() in VIEWS ? state.view() : start;
  const mine = ++turn;
  close();
  close = () => {};
  const bar = document.getElementById("views");
  bar.replaceChildren(...Object.entries(NAMES).map(([key, text]) => el("a", { href: `#${key}`, "aria-current": key === name ? "page" : undefined }, text)));
  document.title = `${NAMES[name]} · Lexel studio`;
  const root = el("div", {});
  document.getElementById("view").replaceChildren(root);
  root.append(el("p", { class: "loading" }, "Loading the model…"));
  try { close = (await VIEWS[name].open(root, models, () => mine === turn)) || (() => {}); }
  catch (error) { root.querySelector(".loading")?.remove(); throw error; }
});

// 1 to 6 open the views, wherever no text is being typed.
document.addEventListener("keydown", (event) => {
  const number = Number(event.key);
  if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
  if (number >= 1 && number <= 6) location.hash = Object.keys(VIEWS)[number - 1];
});
addEventListener("hashchange", show);
addEventListener("unhandledrejection", (event) => tell(event.reason));
show();
