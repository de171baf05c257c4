// The list of questions with their rollouts; search and filter.

const covered = (rollout) => !rollout.correct && rollout.tau !== null;
const OUTCOMES = {
  all: () => true,
  covered,
  alone: (rollout) => !rollout.correct && rollout.tau === null,
  correct: (rollout) => rollout.correct,
};

let matching = rollouts; // what search and filter leave, in order
const buttons = new Map(); // rollout -> its button

function searchable(rollout) {
  const { prompt, question, answer } = rollout.group;
  return rollout.lower ??= [rollout.text, prompt, question, answer ?? ""].join("\n").toLowerCase();
}

function rolloutName(rollout) {
  const peer = rollout.tau === null ? "" : `, leaves peer ${rollout.peer} at token ${rollout.tau}`;
  return `rollout ${rollout.index}, ${rollout.correct ? "correct" : "failed"}${peer}`;
}

function buildList(choose) {
  let number = 0;
  const items = index.groups.map((group) => {
    const item = element("li");
    const row = element("div", undefined, "rollouts");
    for (let place = 0; place < group.rollouts.length; place++) {
      const rollout = rollouts[number++];
      const button = element("button", `${rollout.correct ? "✓" : "✗"}${rollout.index}`,
        rollout.correct ? "correct" : covered(rollout) ? "failed" : "failed alone");
      button.type = "button";
      button.title = rolloutName(rollout);
      button.setAttribute("aria-label", `${group.prompt.slice(0, 80)}: ${rolloutName(rollout)}`);
      button.addEventListener("click", () => choose(rollout));
      buttons.set(rollout, button);
      row.append(button);
    }
    const title = element("p", group.prompt, "prompt");
    if (group.step) title.prepend(element("span", `step ${group.step} `, "quiet"));
    item.append(title, row);
    return item;
  });
  byId("groups").replaceChildren(...items);
}

function filterList() {
  const query = byId("search").value.trim().toLowerCase();
  const fits = OUTCOMES[byId("outcome").value];
  matching = rollouts.filter((rollout) =>
    fits(rollout) && (!query || searchable(rollout).includes(query)));
  const shown = new Set(matching);
  for (const [rollout, button] of buttons) button.hidden = !shown.has(rollout);
  for (const item of byId("groups").children) {
    item.hidden = !item.querySelector("button:not([hidden])");
  }
  byId("matches").textContent = `${matching.length} of ${rollouts.length} rollouts`;
}

function markChosen(rollout) {
  for (const [other, button] of buttons) {
    if (other === rollout) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  // Not scrollIntoView, which would move the page as well.
  const list = byId("groups"), item = buttons.get(rollout).closest("li");
  const above = item.offsetTop - list.offsetTop;
  if (above < list.scrollTop || above + item.offsetHeight > list.scrollTop + list.clientHeight) {
    list.scrollTop = above - 40;
  }
}
