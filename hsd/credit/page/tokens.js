// The rollout and its peer side by side, a span per token, with the divergence marked.

const SVG = "http://www.w3.org/2000/svg";

// White space that would be invisible, or break the line unseen.
function shownText(text) {
  return text.replaceAll("\n", "⏎\n").replaceAll("\r", "␍").replaceAll("\t", "⇥\t").replace(/^ +$/, (s) => "·".repeat(s.length));
}

function tokenBox(rollout, numbers, from, to, label) {
  const box = element("div", undefined, "box");
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-label", label);
  box.setAttribute("aria-orientation", "horizontal");
  const spans = [];
  for (let position = from; position < to; position++) {
    const token = element("span", shownText(textOf(numbers.ids[position])), "token");
    token.setAttribute("role", "option");
    token.setAttribute("aria-selected", "false");
    token.tabIndex = -1;
    token.dataset.position = position;
    if (position === rollout.tau) token.classList.add("tau");
    spans.push(token);
  }
  box.append(...spans);
  return box;
}

// One column: heading, what is shared with the peer, and the rest.
function column(kind, rollout, numbers, tau) {
  const outcome = rollout.correct ? "correct" : "failed";
  const name = `${kind} ${rollout.index}, ${outcome}`;
  const heading = element("h3", undefined, `${outcome} ${kind === "peer" ? "peer" : "own"}`);
  heading.append(element("span", rollout.correct ? "✓" : "✗", "mark"),
    ` ${kind === "peer" ? "Peer" : "Rollout"} ${rollout.index} · ${outcome} · ${rollout.n} tokens`
    + (rollout.cut ? ", cut by length" : ""));
  const shared = tokenBox(rollout, numbers, 0, tau ?? rollout.n,
    tau === null ? `Tokens of ${name}` : `Tokens of ${name}, shared with the other`);
  const parts = { kind, rollout, numbers, heading, boxes: [shared] };
  if (tau !== null) {
    const rest = tokenBox(rollout, numbers, tau, rollout.n, `Tokens of ${name}, from the divergence`);
    if (tau < rollout.n) rest.firstChild.classList.add("tau");
    parts.boxes.push(rest);
  }
  parts.tokens = parts.boxes.flatMap((box) => [...box.children]);
  return parts;
}

// Rows of the grid hold both columns, so that the divergence is at one height in both.
function showPair(columns, tau) {
  const pair = byId("pair");
  pair.className = columns.length === 2 ? "two" : "one";
  pair.replaceChildren(...columns.map((part) => part.heading));
  for (const row of [0, 1]) {
    const boxes = columns.flatMap((part) => part.boxes.slice(row, row + 1));
    if (row === 1 && boxes.length) {
      pair.append(element("p", `◆ divergence at token ${tau}`, "divergence"));
    }
    boxes.forEach((box, i) => {
      box.classList.add(i === 0 ? "own" : "peer", row === 0 ? "shared" : "rest");
      if (!box.children.length) {
        box.removeAttribute("role");
        box.removeAttribute("aria-label");
        box.removeAttribute("aria-orientation");
        const why = row === 0 ? "nothing is shared: they differ from the first token"
          : "ends here: it is a prefix of the other";
        box.append(element("em", why, "quiet"));
      }
    });
    pair.append(...boxes);
  }
}

function colourTokens(columns, measure, context) {
  for (const { tokens, numbers } of columns) {
    tokens.forEach((token, position) => {
      token.style.backgroundColor = colourOf(measure, valueAt(measure, numbers, context, position));
    });
  }
}

// A strip of cells, one per token, in one canvas: the rollout at a glance.
function drawStrip(canvas, rollout, numbers, measure, context, longest) {
  const width = canvas.width = canvas.clientWidth || 600;
  const height = canvas.height = 20;
  const paint = canvas.getContext("2d");
  paint.clearRect(0, 0, width, height);
  const step = (width - 8) / Math.max(longest, 8); // room for a mark at the end
  for (let position = 0; position < rollout.n; position++) {
    const value = valueAt(measure, numbers, context, position);
    paint.fillStyle = colourOf(measure, value) || "transparent";
    paint.fillRect(position * step, 0, Math.max(step - (step > 4 ? 1 : 0), 1), height - 4);
  }
  paint.fillStyle = darkQuery.matches ? "#9aa3ab" : "#5b646c";
  paint.fillRect(0, height - 2, rollout.n * step, 2);
  if (rollout.tau !== null) {
    const x = (rollout.tau + (rollout.tau < rollout.n ? 0.5 : 0)) * step;
    paint.fillStyle = darkQuery.matches ? "#ffffff" : "#000000";
    paint.beginPath();
    paint.moveTo(x, height - 9);
    paint.lineTo(x + 5, height - 4);
    paint.lineTo(x, height + 1);
    paint.lineTo(x - 5, height - 4);
    paint.fill();
  }
}
