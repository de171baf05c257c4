// Everything that is known of one token.

const QUANTITIES = [
  ["log q", (view, numbers, i) => view.logprob[i]],
  ["A", (view, numbers, i) => view.credit[i]],
  ["KL(q‖p)", (view, numbers, i) => view.kl[i]],
  ["H(q)", (view, numbers, i) => view.entropy[i]],
];

function number(value) {
  if (value === undefined || Number.isNaN(value)) return "–";
  return value.toFixed(4).replace("-", "−");
}

const quoted = (text) => `“${text.replaceAll("\n", "⏎").replaceAll("\t", "⇥")}”`;

function row(label, values, active) {
  const line = element("tr");
  const head = element("th", label);
  head.scope = "row";
  line.append(head, ...values.map((value, i) =>
    element("td", value, i === active ? "active" : undefined)));
  return line;
}

function numbersTable(numbers, position, context) {
  const table = element("table", undefined, "numbers");
  const head = element("tr");
  head.append(element("td"), ...index.contexts.map((_, c) => {
    const cell = element("th", contextLabel(c), c === context ? "active" : undefined);
    cell.scope = "col";
    return cell;
  }));
  const body = QUANTITIES.map(([label, of]) =>
    row(label, numbers.views.map((view) => number(view ? of(view, numbers, position) : undefined)), context));
  const caption = element("caption", "With each teacher context, nats", "quiet");
  table.append(caption, head, ...body);
  return table;
}

function topList(title, top, chosen) {
  const part = element("div", undefined, "top");
  part.append(element("h3", title));
  if (!top) {
    part.append(element("p", "not kept for this token, to keep the file small", "quiet"));
    return part;
  }
  const list = element("ol");
  for (const { id, logprob } of top) {
    const share = Math.exp(logprob);
    const item = element("li", undefined, id === chosen ? "chosen" : undefined);
    const bar = element("i");
    bar.style.width = `${(100 * share).toFixed(1)}%`;
    item.append(bar, element("code", quoted(textOf(id))),
      element("span", `${(100 * share).toFixed(1)} %${id === chosen ? ", sampled" : ""}`));
    list.append(item);
  }
  part.append(list);
  return part;
}

function describe(column, position, context) {
  const { rollout, numbers } = column;
  const id = numbers.ids[position];
  const head = element("p", undefined, "head");
  head.append(element("code", quoted(textOf(id))), ` id ${id}`);
  const tau = rollout.tau;
  const where = element("p", `${column.kind} ${rollout.index}, token ${position} of ${rollout.n}`
    + (tau === null ? "" : `, ${position < tau ? `${tau - position} before` : position > tau ? `${position - tau} behind` : "at"} its divergence`), "quiet");
  const own = element("table", undefined, "numbers");
  own.append(element("caption", "The plain model, nats", "quiet"),
    row("log p", [number(numbers.logprob[position])]),
    row("H(p)", [number(numbers.entropy[position])]),
    row("weight", [Number(numbers.weight[position].toPrecision(4)).toString()]));
  const parts = [head, where, own, numbersTable(numbers, position, context)];
  const tops = element("div", undefined, "tops");
  tops.append(topList("Student, most likely", numbers.topAt(0, position), id));
  const side = numbers.side[context];
  if (side !== null) {
    tops.append(topList(`Teacher (${contextLabel(context)}), most likely`, numbers.topAt(side, position), id));
  }
  byId("token").replaceChildren(...parts, tops);
}
