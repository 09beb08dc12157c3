// What every view uses: requests, elements, the state in the address, pickers of models and pictures.

export async function api(path, options = {}) {
  let answer;
  try { answer = await fetch(`/api/${path}`, options); }
  catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the studio does not answer; is `lexel studio` still running?");
  }
  const found = await answer.json().catch(() => ({ error: `the studio answered with status ${answer.status}` }));
  if (!answer.ok) throw new Error(found.error || `status ${answer.status}`);
  return found;
}

export const pause = (time) => new Promise((done) => setTimeout(done, time));

// Work that may take long: a job, with its progress and a button to stop it once it has taken half a second.
export async function long(path, words, options = {}) {
  let job = await api(`${path}${path.includes("?") ? "&" : "?"}job=1`, options);
  const started = Date.now(), box = document.getElementById("working");
  const mine = job.number;
  const here = location.hash.split("?")[0];
  try {
    for (let time = 15; job.state === "running"; time = Math.min(time * 1.6, 400)) {
      await pause(time);
      job = await api(`jobs/${mine}`);
      if (location.hash.split("?")[0] !== here) { api(`jobs/${mine}`, { method: "DELETE" }).catch(() => {}); throw new DOMException("left", "AbortError"); }
      if (job.state === "running" && Date.now() - started > 500) {
        if (box.dataset.job !== mine) {
          box.dataset.job = mine;
          box.replaceChildren(el("span", {}, words), el("progress", { "aria-label": words }), el("button", { type: "button", onclick: () => api(`jobs/${mine}`, { method: "DELETE" }).catch(() => {}) }, "Stop"));
          box.hidden = false;
        }
        const bar = box.querySelector("progress");
        if (job.total) { bar.max = job.total; bar.value = job.done; }
      }
    }
  } finally { if (box.dataset.job === mine) { box.hidden = true; delete box.dataset.job; } }
  if (job.state === "failed") throw new Error(job.error);
  if (job.state === "stopped") throw new Error("stopped");
  return job.result;
}

export const post = (path, value) =>
  api(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(value) });

// An element with attributes, listeners (on...) and children; text is never read as HTML.
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// The view and its settings: #tokens?model=vq&example=3. Two people with the same models see the same thing.
export const state = {
  view() { return location.hash.slice(1).split("?")[0]; },
  get(name, fallback = "") { return new URLSearchParams(location.hash.split("?")[1] || "").get(name) ?? fallback; },
  set(values) {
    const query = new URLSearchParams(location.hash.split("?")[1] || "");
    for (const [name, value] of Object.entries(values)) {
      if (value === null || value === "" || value === undefined) query.delete(name); else query.set(name, value);
    }
    const text = query.toString();
    history.replaceState(null, "", `#${this.view()}${text ? "?" + text : ""}`);
  },
};

export function tell(error) {
  const box = document.getElementById("message");
  if (!error || error.name === "AbortError") { box.hidden = true; return; }
  box.textContent = error.message || String(error);
  box.hidden = false;
}

// Runs what a control asks for; a failure becomes a sentence at the top.
export const attempt = (work) => async (...given) => {
  try { tell(null); return await work(...given); } catch (error) { tell(error); return undefined; }
};

export const field = (label, control) => el("label", { class: "field" }, label, control);

export function select(options, value, change) {
  const node = el("select", { onchange: () => change(node.value) });
  for (const [key, text] of options) node.append(el("option", { value: String(key), selected: String(key) === String(value) }, text));
  return node;
}

export const modelPicker = (label, models, value, change, none) =>
  field(label, select([...(none ? [["", none]] : []), ...models.map((model) => [model.key, model.key])], value, change));

// The tokenizers among models; where there is none, generators, each with its own.
export function tokenizersAmong(models) {
  const found = models.filter((model) => model.kind === "tokenizer");
  return found.length ? found : models;
}

// The key that a setting of the address names, if it is one of these models'.
export function chosenAmong(models, setting = "model", otherwise = models[0].key) {
  const key = state.get(setting);
  return models.some((model) => model.key === key) ? key : otherwise;
}

export const card = (title, ...children) => el("section", {}, title && el("h2", {}, title), ...children);

export function picture(source, caption, note) {
  return el("figure", {}, el("figcaption", {}, el("b", {}, caption), note ? ` ${note}` : ""),
    el("img", { class: "pixels", src: source, alt: caption }));
}

// Choosing a picture: a file dropped, picked, pasted or taken by the camera, or one of the model's examples.
export function picturePicker(key, count, chosen, pick) {
  const file = el("input", { type: "file", accept: "image/*", onchange: () => file.files[0] && take(file.files[0]) });
  const box = el("div", { class: "drop" },
    el("label", { class: "button" }, "Choose a picture", file),
    el("span", { class: "hint" }, "or drop or paste one here; a phone offers its camera"));
  const list = el("div", { class: "examples", role: "group", "aria-label": "Examples" });
  const take = (given) => { mark(null); pick({ file: given }); };
  const mark = (number) => [...list.children].forEach((button, at) => button.setAttribute("aria-pressed", String(at === number)));
  for (let number = 0; number < count; number++) {
    list.append(el("button", { type: "button", "aria-label": `Example ${number + 1}`, onclick: () => { mark(number); pick({ example: number }); } },
      el("img", { class: "pixels", loading: "lazy", alt: "", src: `/api/models/${encodeURIComponent(key)}/examples/${number}` })));
  }
  mark(chosen);
  const over = (on) => (event) => { event.preventDefault(); box.classList.toggle("over", on); };
  box.addEventListener("dragover", over(true));
  box.addEventListener("dragleave", over(false));
  box.addEventListener("drop", (event) => { over(false)(event); if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]); });
  const node = el("div", {}, box, list);
  const paste = (event) => {
    if (!node.isConnected) return document.removeEventListener("paste", paste);
    const given = [...event.clipboardData.files][0];
    if (given) take(given);
  };
  document.addEventListener("paste", paste);
  return node;
}

export async function reconstruct(key, chosen, whole) {
  const model = `models/${encodeURIComponent(key)}/reconstruct?whole=${whole ? 1 : 0}`;
  if (chosen.file) return long(model, "Reconstructing…", { method: "POST", body: await withinLimit(chosen.file) });
  return long(`${model}&example=${chosen.example ?? 0}`, "Reconstructing…", { method: "POST" });
}

// A picture above the limit of the upload is refused here already, in the words of the studio.
async function withinLimit(file) {
  const { limits } = await studio();
  if (file.size > limits.bytes) {
    throw new Error(`the picture has ${file.size.toLocaleString("en")} bytes, the limit is ${limits.bytes.toLocaleString("en")}; make it smaller`);
  }
  return file;
}

let known;
export const studio = () => (known ??= api("studio"));
const seen = new Map();
export const facts = (key) => {
  if (!seen.has(key)) seen.set(key, long(`models/${encodeURIComponent(key)}`, "Loading the model…").catch((error) => { seen.delete(key); throw error; }));
  return seen.get(key);
};

// One colour a code, as in reports: golden-ratio steps spread neighbouring numbers over the colour circle.
export const colour = (code) => `hsl(${((code * 0.61803398875) % 1) * 360} 62% 62%)`;

// A patch out of a sheet of patches with so many columns.
export function patch(sheet, at, columns, rows) {
  const node = el("span", { class: "patch" });
  node.style.backgroundImage = `url(${sheet})`;
  node.style.backgroundSize = `${columns * 100}% ${rows * 100}%`;
  const share = (place, count) => (count > 1 ? `${(place / (count - 1)) * 100}%` : "0");
  node.style.backgroundPosition = `${share(at % columns, columns)} ${share(Math.floor(at / columns), rows)}`;
  return node;
}

export const percent = (share) => `${(share * 100).toFixed(share < 0.001 ? 3 : 1)} %`;
