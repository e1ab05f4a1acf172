// What are the numbers of the page? The quantities, of tokens, blocks, heads and matrices, from the JSON in #data.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const T = data.texts.length, H = data.heads, L = data.matrices, B = data.blocks.length;
const STEPS = 32; // colours of the scale
const NONE = -1; // a choice of "mean", or of all matrices

// ---------------------------------------------------------------------------------------------------------- numbers

// Every value travels as a 16-bit float times a scale of its plane: three digits, in a quarter of the bytes of text.
const half = new Float32Array(65536);
for (let bits = 0; bits < 65536; bits++) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023, sign = bits & 0x8000 ? -1 : 1;
  if (exponent === 0) half[bits] = sign * fraction * 2 ** -24;
  else if (exponent === 31) half[bits] = fraction ? NaN : sign * Infinity;
  else half[bits] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

// {scale, data} -> Float32Array, channels of T tokens one after another; kept in place of the text it came from.
function plane(packed) {
  if (!packed.values) {
    const bytes = atob(packed.data), values = new Float32Array(bytes.length / 2);
    for (let i = 0; i < values.length; i++) {
      values[i] = half[bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8)] * packed.scale;
    }
    packed.values = values;
    packed.data = "";
  }
  return packed.values;
}

const perMatrix = (name) => (b, h, l, t) => plane(data.blocks[b].planes[name])[(h * L + l) * T + t];
const gradient = perMatrix("gradient"), theta = perMatrix("theta");
const step = (b, h, l, t) => theta(b, h, l, t) * gradient(b, h, l, t);

// A quantity over matrices: `of` one of them, or all: the joint norm of gradients and steps, the mean of gates.
const joint = (of) => (b, h, l, t) => {
  if (l !== NONE) return of(b, h, l, t);
  let squares = 0;
  for (let i = 0; i < L; i++) squares += of(b, h, i, t) ** 2;
  return Math.sqrt(squares);
};
const mean = (of) => (b, h, l, t) => {
  if (l !== NONE) return of(b, h, l, t);
  let sum = 0;
  for (let i = 0; i < L; i++) sum += of(b, h, i, t);
  return sum / L;
};
const QUANTITIES = {
  surprise: {
    name: "momentary surprise", short: "surprise", of: joint(gradient), matrices: true,
    text: "Norm of the gradient of the inner loss ½‖M(k) − v‖² at the memory's weights as they stood at the start of the token's chunk: how far the memory is from what this token asks it to hold.",
  },
  step: {
    name: "step taken (θ · surprise)", short: "step", of: joint(step), matrices: true,
    text: "Norm of the gradient times the gate θ: how much of the surprise is written into the memory.",
  },
  loss: {
    name: "inner loss", short: "inner loss", of: (b, h, l, t) => plane(data.blocks[b].planes.inner_loss)[h * T + t], matrices: false,
    text: "½‖M(k) − v‖² at the same weights: the memory's error in recalling the token's value from its key.",
  },
  theta: {
    name: "θ, step size", short: "θ", of: mean(theta), matrices: true,
    text: "The gate θ: the size of the step against the gradient, with the factor 1 − η where the model has it.",
  },
  eta: {
    name: "η, momentum kept", short: "η", of: mean(perMatrix("eta")), matrices: true,
    text: "The gate η: the share of past surprise that goes on at this token.",
  },
  alpha: {
    name: "α, forgetting", short: "α", of: mean(perMatrix("alpha")), matrices: true,
    text: "The gate α: the share of what was learned that is forgotten at this token.",
  },
  nll: {
    name: "the token's own loss", short: "NLL", of: (b, h, l, t) => plane(data.nll)[t], matrices: false,
    text: "−log p of this token given all before it, in nats: the surprise of the whole model, for comparison. The first token has none.",
  },
};
for (const gate of ["eta", "alpha"]) if (!data.blocks[0].planes[gate]) delete QUANTITIES[gate];

const cache = new Map();
// The values of a view, one a token. `block` and `head` NONE: the mean over them.
function view(q, block, head, matrix) {
  const key = `${q}/${block}/${head}/${matrix}`;
  if (cache.has(key)) return cache.get(key);
  const values = new Float32Array(T), of = QUANTITIES[q].of;
  const blocks = q === "nll" ? [0] : block === NONE ? [...Array(B).keys()] : [block];
  const heads = q === "nll" ? [0] : head === NONE ? [...Array(H).keys()] : [head];
  for (const b of blocks) for (const h of heads) for (let t = 0; t < T; t++) values[t] += of(b, h, matrix, t);
  const count = blocks.length * heads.length;
  if (count > 1) for (let t = 0; t < T; t++) values[t] /= count;
  if (cache.size > 60) cache.clear();
  cache.set(key, values);
  return values;
}
const finite = (values) => Float32Array.from(values).filter(Number.isFinite).sort();
const at = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(share * (sorted.length - 1))))];
// How many of `sorted` are below x.
function below(sorted, x) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle + 1; else high = middle;
  }
  return low;
}
function number(x) {
  if (!Number.isFinite(x)) return Number.isNaN(x) ? "–" : x > 0 ? "∞" : "−∞";
  const size = Math.abs(x);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? x.toExponential(2) : x.toPrecision(4);
}
// Spearman's rank correlation of two views where both are there.
function rankCorrelation(x, y) {
  const there = [...Array(T).keys()].filter((t) => Number.isFinite(x[t]) && Number.isFinite(y[t]));
  const ranks = (values) => {
    const sorted = Float32Array.from(there, (t) => values[t]).sort();
    return there.map((t) => (below(sorted, values[t]) + below(sorted, values[t] * (1 + 1e-7) + 1e-30)) / 2);
  };
  const a = ranks(x), b = ranks(y), n = there.length;
  const ma = a.reduce((s, r) => s + r, 0) / n, mb = b.reduce((s, r) => s + r, 0) / n;
  let ab = 0, aa = 0, bb = 0;
  for (let i = 0; i < n; i++) { ab += (a[i] - ma) * (b[i] - mb); aa += (a[i] - ma) ** 2; bb += (b[i] - mb) ** 2; }
  return ab / Math.sqrt(aa * bb);
}
