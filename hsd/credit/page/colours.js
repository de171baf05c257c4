// Colours of numbers. Zero is the page's own background; the ends keep text readable on them.

const MEASURES = [
  { key: "credit", label: "A", name: "credit A = log q − log p", most: 2, signed: true },
  { key: "kl", label: "KL", name: "KL(q‖p)", most: 2, signed: false },
  { key: "entropy", label: "Entropy", name: "entropy of p", most: 3, signed: false },
];

const PALETTES = {
  light: { zero: [255, 255, 255], credit: [86, 170, 222], below: [245, 145, 50],
    kl: [196, 150, 222], entropy: [95, 194, 168] },
  dark: { zero: [20, 23, 26], credit: [31, 95, 168], below: [168, 80, 10],
    kl: [111, 61, 143], entropy: [18, 112, 92] },
};
const darkQuery = matchMedia("(prefers-color-scheme: dark)");

// Square root: a tenth of the range is already visible. Beyond the range the colour stays.
function colourOf(measure, value) {
  if (value === undefined || Number.isNaN(value)) return "";
  const palette = PALETTES[darkQuery.matches ? "dark" : "light"];
  const end = measure.signed && value < 0 ? palette.below : palette[measure.key];
  const share = Math.sqrt(Math.min(1, Math.abs(value) / measure.most));
  const mixed = palette.zero.map((zero, i) => Math.round(zero + (end[i] - zero) * share));
  return `rgb(${mixed.join(",")})`;
}

// The value of a measure at a position; undefined without a teacher.
function valueAt(measure, numbers, context, position) {
  if (measure.key === "entropy") return numbers.entropy[position];
  return numbers.views[context]?.[measure.key][position];
}

function drawScale(measure) {
  const scale = byId("scale");
  const lowest = measure.signed ? -measure.most : 0;
  const cells = Array.from({ length: 41 }, (_, i) => {
    const cell = document.createElement("i");
    cell.style.backgroundColor = colourOf(measure, lowest + (measure.most - lowest) * i / 40);
    return cell;
  });
  const bar = document.createElement("span");
  bar.className = "bar";
  bar.append(...cells);
  const ticks = document.createElement("span");
  ticks.className = "ticks";
  const marks = measure.signed ? [`≤ −${measure.most}`, "0", `≥ ${measure.most} nats`]
    : ["0", `≥ ${measure.most} nats`];
  ticks.append(...marks.map((mark) => element("span", mark)));
  scale.replaceChildren(bar, ticks);
  scale.setAttribute("aria-label", `Colour scale of ${measure.name}, from ${lowest} to ${measure.most} nats`
    + (measure.signed ? "; blue above zero, orange below" : ""));
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}
