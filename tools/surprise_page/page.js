// How does the page show them and answer? Text, colours, tables, keys. Nothing is fetched.

// ---------------------------------------------------------------------------------------------------------- colours

const RAMPS = {
  light: [[255, 255, 255], [254, 240, 200], [253, 200, 110], [244, 120, 50], [190, 24, 60], [100, 0, 60]],
  dark: [[19, 20, 23], [46, 32, 84], [112, 34, 120], [186, 50, 95], [240, 120, 50], [252, 222, 120]],
};
function colours(theme) {
  const stops = RAMPS[theme], ink = theme === "dark" ? [232, 230, 225] : [28, 27, 25];
  const light = ([r, g, b]) => {
    const linear = [r, g, b].map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const contrast = (x, y) => (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
  return Array.from({ length: STEPS }, (_, i) => {
    const place = (i / (STEPS - 1)) ** 1.6 * (stops.length - 1), // what is below the median stays pale
      low = Math.min(stops.length - 2, Math.floor(place));
    const back = stops[low].map((c, j) => Math.round(c + (stops[low + 1][j] - c) * (place - low)));
    const best = [ink, [255, 255, 255], [0, 0, 0]].sort((x, y) => contrast(light(y), light(back)) - contrast(light(x), light(back)))[0];
    const front = contrast(light(ink), light(back)) >= 7 ? ink : best;
    return { back: `rgb(${back})`, front: `rgb(${front})` };
  });
}
let palette = [];
const sheet = document.head.appendChild(document.createElement("style"));
const system = matchMedia("(prefers-color-scheme: dark)");
function applyTheme() {
  const chosen = $("theme").value, theme = chosen === "auto" ? (system.matches ? "dark" : "light") : chosen;
  document.documentElement.dataset.theme = theme;
  palette = colours(theme);
  sheet.textContent = palette.map((c, i) => `.c${i}{background:${c.back};color:${c.front}}`).join("");
  $("ramp").innerHTML = palette.map((_, i) => `<span class="c${i}"></span>`).join("");
  if (classes) drawOverview();
}

// ------------------------------------------------------------------------------------------------------------ state

const choice = { q: "surprise", block: 0, head: NONE, matrix: NONE, scale: "quantile", token: 0 };
let values, sorted, classes = null, peaks = [], spans = [], pointed = null;

function fill(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
}
const escape = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const visible = (t) => data.texts[t].replace(/\n/g, "↵").replace(/\t/g, "⇥") || `‹${data.pieces[t]}›`;

function readHash() {
  const said = new URLSearchParams(location.hash.slice(1));
  const whole = (name, least, most) => {
    const x = Number(said.get(name));
    return said.has(name) && Number.isInteger(x) && x >= least && x <= most ? x : choice[name];
  };
  if (Object.hasOwn(QUANTITIES, said.get("q"))) choice.q = said.get("q");
  choice.block = whole("block", NONE, B - 1);
  choice.head = whole("head", NONE, H - 1);
  choice.matrix = whole("matrix", NONE, L - 1);
  choice.token = whole("token", 0, T - 1);
  if (["quantile", "local", "absolute"].includes(said.get("scale"))) choice.scale = said.get("scale");
  if (["light", "dark"].includes(said.get("theme"))) $("theme").value = said.get("theme");
}

// ------------------------------------------------------------------------------------------------------------- text

function drawText() {
  const parts = ['<div class="line">'];
  for (let t = 0; t < T; t++) {
    const text = data.texts[t];
    if (!text) parts.push(`<i id="t${t}" tabindex="-1" class="mark" data-mark="${escape(data.marks[t])}"></i>`);
    else parts.push(`<i id="t${t}" tabindex="-1">${escape(text)}</i>`);
    if (text.includes("\n") && t + 1 < T) parts.push('</div><div class="line">');
  }
  $("text").innerHTML = parts.join("") + "</div>";
  spans = [...$("text").querySelectorAll("i")];
}

// ------------------------------------------------------------------------------------------------------------ colour

function range() { // of the absolute scale: over all blocks, the quantity's lowest and, outliers aside, highest mean over heads
  const all = [];
  for (let b = 0; b < (choice.q === "nll" ? 1 : B); b++) {
    const s = finite(view(choice.q, b, NONE, QUANTITIES[choice.q].matrices ? choice.matrix : NONE));
    if (s.length) all.push([s[0], at(s, 0.995)]);
  }
  return [Math.min(...all.map((r) => r[0])), Math.max(...all.map((r) => r[1]))];
}
const NEARBY = 128;
function shareNearby() { // of the tokens up to NEARBY away, the share that is lower
  const found = new Float32Array(T);
  for (let t = 0; t < T; t++) {
    let lower = 0, count = 0;
    for (let u = Math.max(0, t - NEARBY); u < Math.min(T, t + NEARBY + 1); u++) {
      if (u === t || Number.isNaN(values[u])) continue;
      lower += values[u] < values[t];
      count++;
    }
    found[t] = Number.isNaN(values[t]) ? NaN : count ? lower / count : 0;
  }
  return found;
}
function colour() {
  const q = QUANTITIES[choice.q], plain = choice.q === "nll";
  values = view(choice.q, choice.block, choice.head, q.matrices ? choice.matrix : NONE);
  sorted = finite(values);
  const [low, high] = choice.scale === "absolute" ? range() : [0, 1];
  const near = choice.scale === "local" ? shareNearby() : null;
  const level = {
    quantile: (t) => below(sorted, values[t]) / Math.max(1, sorted.length - 1),
    absolute: (t) => (values[t] - low) / (high - low || 1),
    local: (t) => near[t],
  }[choice.scale];
  classes = new Int8Array(T);
  for (let t = 0; t < T; t++) {
    classes[t] = Number.isNaN(values[t]) ? NONE : Math.max(0, Math.min(STEPS - 1, Math.floor(level(t) * STEPS)));
    const extra = data.texts[t] ? (data.texts[t].includes("\n") ? " nl" : "") : " mark";
    spans[t].className = (classes[t] === NONE ? "none" : `c${classes[t]}`) + extra;
  }
  spans[choice.token].tabIndex = 0;

  const order = [...Array(T).keys()].filter((t) => Number.isFinite(values[t]));
  order.sort((a, b) => (near ? near[b] - near[a] : 0) || values[b] - values[a] || a - b);
  peaks = order.slice(0, Math.max(1, Math.ceil(T * 0.02))).sort((a, b) => a - b);
  $("peaks").innerHTML = order.slice(0, 20).map((t) => {
    const before = span(t - 4, t).map(visible).join(""), after = span(t + 1, t + 5).map(visible).join("");
    return `<li><button data-token="${t}"><span class="value">${number(values[t])}</span><span class="around">${escape(before.slice(-14))}<b class="c${Math.max(0, classes[t])}">${escape(visible(t))}</b>${escape(after)}</span></button></li>`;
  }).join("");

  for (const id of ["block", "head"]) $(id).disabled = plain;
  $("matrix").disabled = !q.matrices;
  $("meaning").textContent = q.text;
  const shares = [0, 0.25, 0.5, 0.75, 1];
  const ticks = near ? shares.map((s) => [`${100 * s} %`, s === 1 ? "of them are lower" : ""]) : choice.scale === "quantile"
    ? shares.map((s) => [number(at(sorted, s)), ["lowest", "25 %", "median", "75 %", "highest"][shares.indexOf(s)]])
    : shares.map((s) => [number(low + s * (high - low)), s === 0 ? "and less" : s === 1 ? "and more" : ""]);
  $("ticks").innerHTML = ticks.map(([value, text]) => `<span>${value}<small>${text || "&nbsp;"}</small></span>`).join("");
  const total = sorted.reduce((s, x) => s + x, 0);
  const where = plain ? "" : `${choice.block === NONE ? "mean over blocks" : `block ${data.blocks[choice.block].number}`}, ${choice.head === NONE ? "mean over heads" : `head ${choice.head}`}: `;
  const related = plain ? "" : `; rank correlation with the token's own loss ${rankCorrelation(values, view("nll", 0, 0, NONE)).toFixed(2)}`;
  $("legend-text").textContent = `${where}mean ${number(total / sorted.length)}, from ${number(sorted[0])} to ${number(sorted[sorted.length - 1])} over ${T.toLocaleString("en")} tokens${related}.`;
  drawOverview();
  show(pointed ?? choice.token);
}
function span(start, stop) {
  const found = [];
  for (let t = Math.max(0, start); t < Math.min(T, stop); t++) found.push(t);
  return found;
}
function drawOverview() {
  const canvas = $("overview"), width = canvas.clientWidth, ratio = devicePixelRatio || 1, height = 44;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  for (let x = 0; x < width; x++) {
    let most = -1;
    for (let t = Math.floor((x * T) / width); t < Math.max(Math.floor(((x + 1) * T) / width), Math.floor((x * T) / width) + 1); t++) most = Math.max(most, classes[t]);
    if (most < 0) continue;
    const tall = 3 + ((height - 5) * most) / (STEPS - 1);
    pen.fillStyle = palette[Math.max(most, 3)].back;
    pen.fillRect(x, height - tall, 1, tall);
  }
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  pen.fillRect(((choice.token + 0.5) * width) / T - 1, 0, 2, height);
}

// ----------------------------------------------------------------------------------------------------------- numbers

function columns() { // [heading, quantity, matrix]
  const found = [["inner loss", "loss", NONE], ["surprise", "surprise", NONE], ["step", "step", NONE]];
  for (const q of ["surprise", "theta", "eta", "alpha"].filter((name) => QUANTITIES[name])) {
    for (let l = 0; l < L; l++) {
      const symbol = q === "surprise" ? "‖∇W" : QUANTITIES[q].short;
      found.push([symbol + (L > 1 || q === "surprise" ? "₁₂₃₄₅₆₇₈₉"[l] : "") + (q === "surprise" ? "‖" : ""), q, l]);
    }
  }
  return found;
}
function show(t) {
  const loss = plane(data.nll)[t];
  $("token-name").innerHTML = `<code>${escape(visible(t))}</code>`;
  const rank = Number.isFinite(values[t]) ? `; ${QUANTITIES[choice.q].short} ${number(values[t])}, above ${((100 * below(sorted, values[t])) / sorted.length).toFixed(1)} % of the text` : "";
  $("token-facts").textContent = `token ${t + 1} of ${T}, id ${data.ids[t]}; its own loss ${number(loss)} nats${rank}`;
  const heads = columns(), shown = (q, l) => q === choice.q && (l === choice.matrix || !QUANTITIES[q].matrices);
  const row = (name, b, h, mean) => {
    const chosen = b === choice.block && h === choice.head;
    const cells = heads.map(([, q, l]) => {
      let x = 0;
      if (h === NONE) { for (let i = 0; i < H; i++) x += QUANTITIES[q].of(b, i, l, t); x /= H; } else x = QUANTITIES[q].of(b, h, l, t);
      return `<td${chosen && shown(q, l) ? ' class="shown"' : ""}>${number(x)}</td>`;
    });
    return `<tr${mean ? ' class="mean"' : ""}><th scope="row">${name}</th>${cells.join("")}</tr>`;
  };
  const bodies = data.blocks.map((block, b) => {
    const chosen = b === choice.block || choice.block === NONE;
    const rows = [row(`block ${block.number}, mean of heads`, b, NONE, true)];
    if (b === choice.block || $("all-heads").checked) for (let h = 0; h < H; h++) rows.push(row(`head ${h}`, b, h, false));
    return `<tbody${chosen ? ' class="chosen"' : ""}>${rows.join("")}</tbody>`;
  });
  $("numbers").innerHTML = `<thead><tr><th scope="col">${data.blocks.length} memories</th>${heads.map(([name]) => `<th scope="col">${name}</th>`).join("")}</tr></thead>${bodies.join("")}`;
}

// ------------------------------------------------------------------------------------------------------------ moving

function go(t, focus = true) {
  t = Math.max(0, Math.min(T - 1, t));
  spans[choice.token].tabIndex = -1;
  choice.token = t;
  spans[t].tabIndex = 0;
  pointed = null;
  if (focus) {
    spans[t].focus({ preventScroll: true });
    spans[t].scrollIntoView({ block: "nearest" });
  }
  show(t);
  drawOverview();
  $("live").textContent = `${visible(t)}: ${$("token-facts").textContent}`;
  writeHash();
}
function line(direction) { // the token nearest above or below
  const here = spans[choice.token].getBoundingClientRect(), middle = here.left + here.width / 2;
  let best = null, bestFar = Infinity, top = null;
  for (let t = choice.token + direction; t >= 0 && t < T; t += direction) {
    const box = spans[t].getBoundingClientRect();
    if (Math.abs(box.top - here.top) < 4) continue;
    if (top !== null && Math.abs(box.top - top) > 4) break;
    top = box.top;
    const far = Math.abs(box.left + box.width / 2 - middle);
    if (far < bestFar) { best = t; bestFar = far; }
  }
  return best ?? choice.token;
}
function writeHash() {
  const said = new URLSearchParams({ q: choice.q, block: choice.block, head: choice.head, matrix: choice.matrix, scale: choice.scale, token: choice.token });
  if ($("theme").value !== "auto") said.set("theme", $("theme").value);
  history.replaceState(null, "", `#${said}`);
}
function setBlock(b) {
  choice.block = Math.max(NONE, Math.min(B - 1, b));
  $("block").value = choice.block;
  colour();
  writeHash();
}

$("text").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const moves = {
    ArrowRight: () => go(choice.token + 1), ArrowLeft: () => go(choice.token - 1),
    ArrowDown: () => go(line(1)), ArrowUp: () => go(line(-1)), Home: () => go(0), End: () => go(T - 1),
    n: () => go(peaks.find((t) => t > choice.token) ?? peaks[0]),
    p: () => go(peaks.findLast((t) => t < choice.token) ?? peaks[peaks.length - 1]),
    "]": () => { setBlock(choice.block + 1); spans[choice.token].focus(); },
    "[": () => { setBlock(choice.block - 1); spans[choice.token].focus(); },
  };
  const move = moves[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!move) return;
  event.preventDefault();
  move();
});
const tokenOf = (target) => (target.tagName === "I" ? Number(target.id.slice(1)) : null);
$("text").addEventListener("click", (event) => { const t = tokenOf(event.target); if (t !== null) go(t); });
$("text").addEventListener("focusin", (event) => { const t = tokenOf(event.target); if (t !== null && t !== choice.token) go(t, false); });
$("text").addEventListener("mouseover", (event) => {
  const t = tokenOf(event.target);
  if (t === null || t === pointed) return;
  pointed = t;
  show(t);
});
$("text").addEventListener("mouseleave", () => { if (pointed !== null) { pointed = null; show(choice.token); } });
$("peaks").addEventListener("click", (event) => { const button = event.target.closest("button"); if (button) go(Number(button.dataset.token)); });
$("overview").addEventListener("click", (event) => go(Math.floor((event.offsetX / $("overview").clientWidth) * T)));
addEventListener("resize", drawOverview);
$("all-heads").addEventListener("change", () => show(choice.token));
$("theme").addEventListener("change", () => { applyTheme(); writeHash(); });
system.addEventListener("change", applyTheme);
for (const [id, key] of [["quantity", "q"], ["block", "block"], ["head", "head"], ["matrix", "matrix"], ["scale", "scale"]]) {
  $(id).addEventListener("change", () => {
    choice[key] = ["q", "scale"].includes(key) ? $(id).value : Number($(id).value);
    colour();
    writeHash();
  });
}

// ------------------------------------------------------------------------------------------------------------- begin

fill($("quantity"), Object.entries(QUANTITIES).map(([key, q]) => [key, q.name]));
fill($("block"), [...data.blocks.map((b, i) => [i, `${b.number}`]), [NONE, "all, mean"]]);
fill($("head"), [[NONE, "all, mean"], ...Array.from({ length: H }, (_, h) => [h, `${h}`])]);
fill($("matrix"), [[NONE, "all"], ...Array.from({ length: L }, (_, l) => [l, `W${l + 1}`])]);
$("facts").textContent = data.facts;
document.title = `Surprise map: ${data.source}`;
readHash();
for (const [id, key] of [["quantity", "q"], ["block", "block"], ["head", "head"], ["matrix", "matrix"], ["scale", "scale"]]) $(id).value = choice[key];
drawText();
applyTheme();
colour();
if (choice.token) spans[choice.token].scrollIntoView({ block: "center" });
document.documentElement.dataset.ready = "yes";
