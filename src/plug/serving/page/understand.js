// The reading room: labels, masks, entities, answers and questions, where the models can.

import { call } from "./api.js";
import { t } from "./words.js";

const TASKS = {
  classify: { name: "分类", fields: [["text", "文字"], ["labels", "标签（用逗号或换行分开）"]], example: { text: "昨晚的比赛踢满了一百二十分钟，主队在点球大战中取胜。", labels: "体育，财经，科技，娱乐" } },
  fill_mask: { name: "填空", fields: [["text", "含 [MASK] 的文字"]], example: { text: "中国的首都是北[MASK]。" } },
  tag: { name: "实体", fields: [["text", "文字"]], example: { text: "李雷在北京大学读书。" } },
  answer: { name: "问答", fields: [["text", "文字"], ["question", "问题"]], example: { text: "北京大学创办于1898年，是中国近代第一所国立综合性大学。", question: "北京大学是哪一年创办的？" } },
  questions: { name: "出题", fields: [["text", "文字"], ["answer", "答案（文字里的一段）"]], example: { text: "北京大学创办于1898年，是中国近代第一所国立综合性大学。", answer: "1898年" } },
};

const make = (tag, more = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), more);
  element.append(...children);
  return element;
};

// An element with a word of the page, which follows a change of language.
const word = (tag, chinese, more) => {
  const element = make(tag, { textContent: t(chinese), ...more });
  element.dataset.t = chinese;
  return element;
};

// Fill `room` with what the models can; whether there is anything.
export function openReadingRoom(room, models, complain) {
  const tasks = Object.entries(TASKS).filter(([task]) => models.some((model) => model.can.includes(task)));
  const form = make("form", { className: "form card" }), results = make("ol", { className: "results card" });
  results.setAttribute("aria-live", "polite");
  const chips = make("div", { className: "chips" });
  const choose = (task) => {
    const { fields, example, name } = TASKS[task];
    for (const chip of chips.children) chip.setAttribute("aria-pressed", chip.dataset.task === task);
    const inputs = fields.map(([field, label]) => {
      const input = make(field === "question" || field === "answer" ? "input" : "textarea", { name: field, required: true, value: example[field] });
      return make("label", {}, word("span", label), input);
    });
    const chosen = make("select", { name: "model" }, ...models.filter((model) => model.can.includes(task)).map((model) => make("option", { value: model.id, textContent: model.id })));
    form.replaceChildren(chips, ...inputs, make("label", {}, word("span", "模型"), chosen), word("button", "开始", { className: "primary" }));
    results.replaceChildren();
    form.onsubmit = async (event) => {
      event.preventDefault();
      const values = Object.fromEntries(new FormData(form));
      const button = form.querySelector(".primary");
      button.disabled = true;
      try { results.replaceChildren(...(await ask(task, values))); } catch (error) { complain(error); }
      button.disabled = false;
    };
    form.dataset.tLabel = name;
    form.setAttribute("aria-label", t(name));
  };
  chips.append(...tasks.map(([task, { name }]) => {
    const chip = word("button", name, { type: "button", onclick: () => choose(task) });
    chip.dataset.task = task;
    return chip;
  }));
  room.replaceChildren(form, results);
  if (tasks.length) choose(tasks[0][0]);
  return tasks.length;
}

async function ask(task, { model, text, labels, question, answer }) {
  const bar = (name, value) => make("li", {}, make("div", { textContent: `${name} · ${(100 * value).toFixed(1)}%` }), make("meter", { min: 0, max: 1, value, ariaLabel: name }));
  const nothing = () => [make("li", { textContent: t("没有找到。") })];
  if (task === "classify") {
    const names = labels.split(/[,，、\n]/).map((label) => label.trim()).filter(Boolean);
    const { data } = await call("v1/classify", { model, input: text, labels: names });
    return data[0].labels.map((each) => bar(each.label, each.probability));
  }
  if (task === "fill_mask") {
    const { data } = await call("v1/fill-mask", { model, input: text });
    return data[0].masks.flatMap((mask) => mask.candidates.map((each) => bar(each.text, each.probability)));
  }
  if (task === "tag") {
    const { data } = await call("v1/tag", { model, input: text });
    const { entities } = data[0];
    if (!entities.length) return nothing();
    const shown = make("li"), letters = [...text]; // the server counts characters, not halves of them
    const cut = (begin, end) => letters.slice(begin, end).join("");
    let at = 0;
    for (const entity of entities) {
      shown.append(cut(at, entity.start), make("mark", {}, cut(entity.start, entity.end), make("sub", { textContent: ` ${entity.label}` })));
      at = entity.end;
    }
    shown.append(cut(at));
    return [shown];
  }
  if (task === "questions") {
    const { data } = await call("v1/questions", { model, context: text, answer });
    return data[0].question ? [make("li", { textContent: data[0].question })] : nothing();
  }
  const { data } = await call("v1/answer", { model, context: text, question });
  return data[0].answer ? [make("li", { textContent: data[0].answer })] : nothing();
}
