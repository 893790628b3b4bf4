// Chinese is the page's language and the key of its English.

import { keep, kept } from "./store.js";

const ENGLISH = {
  "AI写手": "AI Writer", "跳到正文": "Skip to the text", "无题": "Untitled", "作品名": "Title", "工具": "Tools", "作品": "Works", "密钥": "Key",
  "切换深色和浅色": "Dark or light", "功能": "Functions", "写作": "Write", "理解": "Understand", "写字台": "Desk", "范例": "Examples", "结果": "Result",
  "可视化结果": "Text", "JSON代码": "JSON", "正文": "Text", "写下开头，按“开始写作”，模型接着写。": "Write an opening, press “Write”, and the model continues.",
  "备选词": "Alternatives", "开始写作": "Write", "接着写": "Go on", "停止": "Stop", "换一个": "Others", "撤销": "Undo", "重做": "Redo", "复制": "Copy",
  "你写的": "by you", "模型写的": "by the model", "点模型写的字，看备选词。": "Click a word of the model to see what else it might have written.",
  "几种续写": "Continuations", "参数": "Settings", "模型": "Model", "长度（词元）": "Length (tokens)", "温度": "Temperature", "随机种子": "Seed", "每次不同": "new each time",
  "设定/记忆": "Notes / memory", "人物、地点、口吻。它始终在编码器所读内容的最前面。": "People, places, tone. The encoder always reads this first.",
  "编码器现在读到什么": "What the encoder reads now", "历史与分支": "History and branches", "写": "write", "撤销、重做": "undo, redo", "光标处的备选词": "alternatives at the caret",
  "新作品": "New work", "导入": "Import", "关闭": "Close", "作品只存在这个浏览器里。清除浏览数据之前，请先导出。": "Works are kept in this browser alone. Export them before you clear its data.",
  "访问密钥": "Access key", "服务器要求密钥时填写（--api-key）。只存在这个标签页里。": "If the server asks for one (--api-key). Kept in this tab alone.", "确定": "OK", "取消": "Cancel",
  "小说续写": "Novel", "技术文档": "Technical text", "常识问答": "Question", "零样本分类": "Zero-shot classification",
  "字": "characters", "词元": "tokens", "采用": "Keep", "原来的": "The one before", "续写": "Continuation", "没有写完": "unfinished", "删除": "Delete", "打开": "Open", "开头": "Beginning", "你": "You",
  "正在写……": "Writing…", "已停止，写出的都留着。": "Stopped. What was written stays.", "写完了。": "Done.", "模型到此收尾。": "The model ended here.", "已复制。": "Copied.", "复制没有成功，请选中后用 Ctrl+C。": "Copying failed: select the text and press Ctrl+C.",
  "先写一个开头。": "Write an opening first.", "已保存": "Saved", "没有能保存：": "Could not save: ",
  "服务器正忙，{0} 秒后再试。写出的都留着。": "The server is busy; try again in {0} s. What was written stays.",
  "密钥不对，或缺少密钥。请填写。": "The key is wrong or missing.",
  "太长了：": "Too long: ", "服务器没有接受：": "The server refused: ", "服务器出错（{0}）：": "The server failed ({0}): ",
  "连不上服务器，或中途断开。写出的都留着，恢复后按“接着写”。": "The server cannot be reached or went away. What was written stays; press “Go on” when it is back.",
  "设定占了 {0} 个词元，正文只剩 {1} 个。请缩短设定。": "The notes take {0} tokens and leave {1} for the text. Shorten them.",
  "读到 {0} / {1} 个词元（设定 {2}）；前面 {3} 个字读不到。": "{0} of {1} tokens are read (notes {2}); {3} characters before them are not.",
  "这里没有备选词：不是模型写的，或没有记下概率。": "No alternatives here: not by the model, or without probabilities.",
  "选一个，从那里接着写：": "Choose one and go on from there:",
  "这个文件不是作品：": "Not a work: ", "这个文件不是文本：": "Not a text: ",
  "这个作品在另一个标签页里也改过。这里的另存为一个作品，两个都在“作品”里。": "This work was changed in another tab too. What is here is kept as a second work; both are under “Works”.",
  "服务器上的模型换了，请再试一次。": "The server has other models now. Try again.", "删除“{0}”？不能恢复。": "Delete “{0}”? This cannot be undone.",
  "文字": "Text", "标签（用逗号或换行分开）": "Labels (separated by commas or lines)", "分类": "Classify", "填空": "Fill the mask", "实体": "Entities", "问答": "Answer", "出题": "Make a question", "答案（文字里的一段）": "Answer (a part of the text)",
  "问题": "Question", "开始": "Run", "含 [MASK] 的文字": "Text with [MASK]", "没有找到。": "Nothing found.", "没有可用的模型。": "No model for this.",
};

let isEnglish = kept("language") === "en";

export function t(chinese, ...values) {
  const text = isEnglish ? ENGLISH[chinese] ?? chinese : chinese;
  return text.replace(/\{(\d)\}/g, (_, index) => values[index]);
}

export function translate(root = document) {
  document.documentElement.lang = isEnglish ? "en" : "zh-CN";
  document.title = `${t("AI写手")} · PLUG`;
  for (const element of root.querySelectorAll("[data-t]")) {
    element.dataset.t ||= element.textContent;
    element.textContent = t(element.dataset.t);
  }
  for (const element of root.querySelectorAll("[data-t-label]")) element.setAttribute("aria-label", t(element.dataset.tLabel));
  for (const element of root.querySelectorAll("[data-t-placeholder]")) element.placeholder = t(element.dataset.tPlaceholder);
}

export function switchLanguage() {
  isEnglish = !isEnglish;
  keep("language", isEnglish ? "en" : "zh");
  translate();
  return isEnglish;
}
export const english = () => isEnglish;
