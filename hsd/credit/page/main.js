// State, and what happens on clicks and keys.

const state = { measure: 0, context: 0, columns: [], rollout: null, column: null, position: null };

async function choose(rollout) {
  state.rollout = rollout;
  markChosen(rollout);
  const peer = peerOf(rollout);
  const [numbers, peerNumbers] = await Promise.all(
    [rollout, peer].map((each) => each && numbersOf(each, state.context)));
  if (state.rollout !== rollout) return; // another was chosen meanwhile
  state.columns = [column("rollout", rollout, numbers, peer ? rollout.tau : null)];
  if (peer) state.columns.push(column("peer", peer, peerNumbers, rollout.tau));
  state.column = state.position = null;
  byId("prompt").textContent = rollout.group.prompt;
  byId("answer").textContent = rollout.group.answer === null ? "" : `Answer: ${rollout.group.answer}`;
  showPair(state.columns, rollout.tau);
  state.columns[0].tokens[0].tabIndex = 0; // where Tab enters
  buildStrips(rollout);
  redraw();
}

function redraw() {
  const measure = MEASURES[state.measure];
  drawScale(measure);
  if (!state.rollout) return;
  colourTokens(state.columns, measure, state.context);
  drawProfile(state.rollout, state.columns[0].numbers, state.context);
  if (state.column) describe(state.column, state.position, state.context);
  const note = [];
  const { views, missing } = state.columns[0].numbers;
  const taught = state.rollout.credit[state.context] !== null;
  if (taught && !views[state.context]) {
    note.push(missing ? `“${contextLabel(state.context)}” is in the file ${missing}, which is not beside this page.`
      : `“${contextLabel(state.context)}” is being loaded.`);
  } else if (measure.key !== "entropy" && !taught) {
    note.push(`“${contextLabel(state.context)}” gives this rollout no teacher: it has no such peer.`);
  } else if (!peerOf(state.rollout)) {
    note.push("No other rollout of the group succeeded, so it has no peer.");
  }
  byId("note").textContent = note.join(" ");
  drawStrips();
}

function buildStrips(rollout) {
  const first = rollout.number - rollout.place;
  const group = rollouts.slice(first, first + rollout.group.rollouts.length);
  const rows = group.map((each) => {
    const line = element("tr", undefined, each.correct ? "correct" : "failed");
    const button = element("button", String(each.index));
    button.type = "button";
    button.setAttribute("aria-label", `Show ${rolloutName(each)}`);
    if (each === rollout) {
      line.classList.add("chosen");
      button.setAttribute("aria-current", "true");
    }
    button.addEventListener("click", () => choose(each));
    const head = element("th");
    head.scope = "row";
    head.append(button);
    const strip = element("td", undefined, "strip");
    const canvas = element("canvas");
    canvas.setAttribute("aria-hidden", "true");
    strip.append(canvas);
    line.append(head, element("td", each.correct ? "✓ correct" : "✗ failed"),
      element("td", each.peer === null ? "–" : `${each.peer}, τ ${each.tau}`), element("td", String(each.n)),
      element("td"), strip);
    return line;
  });
  byId("strips").tBodies[0].replaceChildren(...rows);
}

async function drawStrips() {
  const { rollout, context } = state;
  const first = rollout.number - rollout.place;
  const group = rollouts.slice(first, first + rollout.group.rollouts.length);
  const longest = Math.max(...group.map((each) => each.n));
  const lines = byId("strips").tBodies[0].rows;
  for (const [place, each] of group.entries()) {
    const numbers = await numbersOf(each, context);
    if (state.rollout !== rollout || state.context !== context) return;
    const credit = each.credit[context];
    lines[place].cells[4].textContent = credit === null ? "–" : credit.toFixed(3);
    drawStrip(lines[place].querySelector("canvas"), each, numbers, MEASURES[state.measure], context, longest);
  }
}

// Tokens -------------------------------------------------------------------------------------

function tokenAt(target) {
  const token = target.closest?.(".token");
  if (!token) return null;
  const part = state.columns.find(({ boxes }) => boxes.includes(token.parentElement));
  return part ? [part, Number(token.dataset.position)] : null;
}

function selectToken(part, position) {
  for (const { tokens } of state.columns) {
    for (const token of tokens) {
      if (token.tabIndex === 0) token.tabIndex = -1;
      if (token.getAttribute("aria-selected") === "true") token.setAttribute("aria-selected", "false");
    }
  }
  Object.assign(state, { column: part, position });
  const token = part.tokens[position];
  token.tabIndex = 0;
  token.setAttribute("aria-selected", "true");
  if (document.activeElement !== token) token.focus();
  describe(part, position, state.context);
}

// The token above or below, where the text is wrapped.
function verticalNeighbour(tokens, position, direction) {
  const from = tokens[position].getClientRects()[0];
  let best = null, line = null;
  for (let i = position + direction; i >= 0 && i < tokens.length; i += direction) {
    const at = tokens[i].getClientRects()[0];
    if (!at || Math.abs(at.top - from.top) < from.height / 2) continue;
    line ??= at.top;
    if (Math.abs(at.top - line) > from.height / 2) break;
    const gap = Math.abs(at.left - from.left);
    if (best === null || gap < best.gap) best = { gap, i };
  }
  return best?.i ?? position;
}

function largestCredit(numbers) {
  const view = numbers.views[state.context];
  if (!view) return 0;
  return view.credit.reduce((best, credit, i) =>
    Math.abs(credit) > Math.abs(view.credit[best]) ? i : best, 0);
}

const TOKEN_KEYS = {
  ArrowLeft: (tokens, i) => i - 1,
  ArrowRight: (tokens, i) => i + 1,
  ArrowUp: (tokens, i) => verticalNeighbour(tokens, i, -1),
  ArrowDown: (tokens, i) => verticalNeighbour(tokens, i, 1),
  Home: () => 0,
  End: (tokens) => tokens.length - 1,
};

// Keys ---------------------------------------------------------------------------------------

function step(by) {
  if (!matching.length) return;
  const at = matching.indexOf(state.rollout);
  const next = at < 0 ? matching.find((r) => by < 0 || r.number > state.rollout.number) ?? matching[0]
    : matching[Math.min(matching.length - 1, Math.max(0, at + by))];
  choose(next);
}

function stepGroup(by) {
  const groups = [...new Set(matching.map((rollout) => rollout.group))];
  const at = groups.indexOf(state.rollout.group);
  const group = groups[Math.min(groups.length - 1, Math.max(0, at + by))];
  if (group) choose(matching.find((rollout) => rollout.group === group));
}

function pick(name, value) {
  state[name] = value;
  const input = document.querySelector(`input[name=${name}][value="${value}"]`);
  input.checked = true;
  redraw();
  if (name === "context" && state.rollout) addContexts();
}

// Loads what the chosen context needs and the page does not hold.
async function addContexts() {
  const { columns, context } = state;
  const here = ({ rollout, numbers }) => rollout.credit[context] === null || numbers.views[context];
  if (columns.every(here)) return;
  for (const part of columns) part.numbers = await numbersOf(part.rollout, context);
  if (state.columns === columns && state.context === context) redraw();
}

const KEYS = {
  j: ["next rollout", () => step(1)],
  k: ["previous rollout", () => step(-1)],
  J: ["next question", () => stepGroup(1)],
  K: ["previous question", () => stepGroup(-1)],
  d: ["to the divergence", () => {
    const part = state.column ?? state.columns[0];
    selectToken(part, Math.min(state.rollout.tau ?? 0, part.tokens.length - 1));
  }],
  m: ["to the largest |A|", () => {
    const part = state.column ?? state.columns[0];
    selectToken(part, largestCredit(part.numbers));
  }],
  p: ["between rollout and peer", () => {
    const other = state.columns.find((part) => part !== (state.column ?? state.columns[0]));
    if (other) selectToken(other, Math.min(state.position ?? 0, other.tokens.length - 1));
  }],
  1: ["colour by A", () => pick("measure", 0)],
  2: ["colour by KL", () => pick("measure", 1)],
  3: ["colour by entropy", () => pick("measure", 2)],
  c: ["next teacher context", () => pick("context", (state.context + 1) % index.contexts.length)],
  "/": ["search", () => { byId("browser").open = true; byId("search").focus(); }],
  "?": ["this list", () => byId("help").showModal()],
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (event.target.matches("input[type=search], select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const at = tokenAt(event.target);
  if (at && TOKEN_KEYS[event.key]) {
    const [part, position] = at;
    const next = TOKEN_KEYS[event.key](part.tokens, position);
    if (part.tokens[next]) selectToken(part, next);
    event.preventDefault();
  } else if (Object.hasOwn(KEYS, event.key)) {
    KEYS[event.key][1]();
    event.preventDefault();
  }
}

function radios(fieldset, name, labels) {
  labels.forEach((label, value) => {
    const input = element("input");
    Object.assign(input, { type: "radio", name, value: String(value), checked: value === 0 });
    input.addEventListener("change", () => pick(name, value));
    const frame = element("label");
    frame.append(input, element("span", label));
    fieldset.append(frame);
  });
}

function start() {
  const { summary } = index;
  document.title = `Credit: ${index.title}`;
  byId("title").textContent = `Credit: ${index.title}`;
  byId("facts").textContent = [
    `${summary.rollouts} rollouts of ${index.model}`, `${summary.correct} correct`,
    `${summary.failed_with_peer} failed with a peer`,
    ...(index.shown < summary.rollouts ? [`the first ${index.shown} are here`] : []),
  ].join(" · ");
  radios(byId("measures"), "measure", MEASURES.map((measure) => measure.label));
  radios(byId("contexts"), "context", index.contexts.map((_, c) => contextLabel(c)));
  byId("keys").append(...Object.entries({ ...KEYS, "← → ↑ ↓": ["between tokens"] }).map(([key, [what]]) => {
    const pair = element("div");
    pair.append(element("dt", key), element("dd", what));
    return pair;
  }));
  buildList(choose);
  filterList();
  if (matchMedia("(max-width: 760px)").matches) byId("browser").open = false;
  byId("search").addEventListener("input", filterList);
  byId("outcome").addEventListener("change", filterList);
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  byId("help-close").addEventListener("click", () => byId("help").close());
  byId("pair").addEventListener("pointerover", (event) => {
    const at = tokenAt(event.target);
    if (at) describe(...at, state.context);
  });
  byId("pair").addEventListener("pointerleave", () => {
    if (state.column) describe(state.column, state.position, state.context);
  });
  byId("pair").addEventListener("click", (event) => {
    const at = tokenAt(event.target);
    if (at) selectToken(...at);
  });
  byId("pair").addEventListener("focusin", (event) => {
    const at = tokenAt(event.target);
    if (at && (state.column !== at[0] || state.position !== at[1])) selectToken(...at);
  });
  document.addEventListener("keydown", onKey);
  darkQuery.addEventListener("change", redraw);
  choose(rollouts.find(covered) ?? rollouts[0]);
}

start();
