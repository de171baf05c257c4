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
  const { most, signed } = measure;
  const lowest = signed ? -most : 0;
  const cells = Array.from({ length: 41 }, (_, i) => {
    const place = signed ? i / 20 - 1 : i / 40; // linear in colour, quadratic in the value
    const cell = element("i");
    cell.style.backgroundColor = colourOf(measure, Math.sign(place) * place * place * most);
    return cell;
  });
  const bar = element("span", undefined, "bar");
  bar.append(...cells);
  const marks = signed ? [-1, -0.25, 0, 0.25, 1] : [0, 0.25, 1];
  const ticks = element("span", undefined, signed ? "ticks signed" : "ticks");
  ticks.append(...marks.map((mark) => {
    const tick = element("span", String(mark * most).replace("-", "−"));
    const place = Math.sign(mark) * Math.sqrt(Math.abs(mark));
    tick.style.left = `${100 * (signed ? (place + 1) / 2 : place)}%`;
    return tick;
  }));
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
