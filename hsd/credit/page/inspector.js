// Everything that is known of one token.

const QUANTITIES = [["A", "credit"], ["log q", "logprob"], ["KL", "kl"], ["H(q)", "entropy"]];

function number(value) {
  if (value === undefined || Number.isNaN(value)) return "–";
  return value.toFixed(4).replace("-", "−");
}

const quoted = (text) => `“${text.replaceAll("\n", "⏎").replaceAll("\t", "⇥")}”`;

function percent(share) {
  return share >= 5e-4 ? `${(100 * share).toFixed(1)} %` : share.toExponential(0).replace("-", "−");
}

function heading(text, scope) {
  const head = element("th", text);
  head.scope = scope;
  return head;
}

function row(label, values, className) {
  const line = element("tr", undefined, className);
  line.append(heading(label, "row"), ...values.map((value) => element("td", value)));
  return line;
}

function numbersTable(numbers, position, context) {
  const table = element("table", undefined, "numbers");
  const head = element("tr");
  head.append(heading("context", "col"), ...QUANTITIES.map(([label]) => heading(label, "col")));
  const body = numbers.views.map((view, c) => row(
    contextLabel(c), QUANTITIES.map(([, key]) => number(view?.[key][position])),
    c === context ? "active" : undefined));
  table.append(head, ...body);
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
      element("span", percent(share) + (id === chosen ? ", sampled" : "")));
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
  const labels = element("tr");
  labels.append(...["log p", "H(p)", "weight"].map((label) => heading(label, "col")));
  const values = element("tr");
  values.append(element("td", number(numbers.logprob[position])),
    element("td", number(numbers.entropy[position])),
    element("td", Number(numbers.weight[position].toPrecision(3)).toString()));
  own.append(labels, values);
  const parts = [head, where, own, numbersTable(numbers, position, context)];
  const tops = element("div", undefined, "tops");
  tops.append(topList("Student, most likely", numbers.tops[0](position), id));
  const side = numbers.side[context];
  if (side !== null) {
    tops.append(topList(`Teacher (${contextLabel(context)}), most likely`, numbers.tops[side](position), id));
  }
  byId("token").replaceChildren(...parts, tops);
}
