// Every label of the page in the languages we speak. The browser's language chooses; English when in doubt.

const words = {
  en: {
    model: "Model", newChat: "New chat", settings: "Settings", send: "Send", stop: "Stop",
    welcome: "What would you like to know?",
    welcomeMore: "A model you raised yourself, running on this machine.",
    question: "Your message", placeholder: "Ask something …",
    mistakes: "Small models make mistakes.", keys: "Enter sends · Shift+Enter new line · Esc stops",
    temperature: "Temperature", temperatureHint: "0 always takes the likeliest word; higher is more varied.",
    maxTokens: "Longest answer (tokens)", system: "System message", key: "API key (kept until you close this tab)",
    done: "Done", copy: "Copy", copied: "Copied", up: "Good answer", down: "Bad answer", again: "Answer again",
    whichBetter: "Which answer is better? Your choice is kept as a preference.",
    first: "Answer 1", second: "Answer 2", better: "This one is better", same: "About the same",
    stopped: "stopped", tooLong: "cut at the longest length", answered: "Answer complete.",
    forgot: "The conversation had become too long for this model; its oldest turns were left out.",
    thanks: "Thank you, noted.", noted: "Choice noted.", sorry: "That did not work: ",
    offline: "the server cannot be reached", needKey: "this server needs an API key (see settings)",
    examples: ["What does textwrap.dedent do?", "12+29=?", "你是谁？"],
  },
  zh: {
    model: "模型", newChat: "新对话", settings: "设置", send: "发送", stop: "停止",
    welcome: "想知道些什么？",
    welcomeMore: "你亲手训练的模型，就在这台机器上运行。",
    question: "你的消息", placeholder: "问点什么……",
    mistakes: "小模型会出错。", keys: "Enter 发送 · Shift+Enter 换行 · Esc 停止",
    temperature: "温度", temperatureHint: "0 总是选最可能的词；越高越多样。",
    maxTokens: "最长回答（词元）", system: "系统消息", key: "API 密钥（关闭标签页即忘）",
    done: "完成", copy: "复制", copied: "已复制", up: "好回答", down: "差回答", again: "重新回答",
    whichBetter: "哪个回答更好？你的选择会作为偏好保存。",
    first: "回答 1", second: "回答 2", better: "这个更好", same: "差不多",
    stopped: "已停止", tooLong: "达到长度上限", answered: "回答完毕。",
    forgot: "对话超出了模型的长度，最早的几轮已略去。",
    thanks: "谢谢，已记录。", noted: "选择已记录。", sorry: "出错了：",
    offline: "无法连接服务器", needKey: "此服务器需要 API 密钥（见设置）",
    examples: ["12+29=?", "你是谁？", "What does textwrap.dedent do?"],
  },
};

export const language = (navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";
export const word = words[language];

/** Fill the labels of the page. */
export function label(root) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const place of root.querySelectorAll("[data-word]")) place.textContent = word[place.dataset.word];
  for (const place of root.querySelectorAll("[data-title]")) {
    place.title = word[place.dataset.title];
    place.setAttribute("aria-label", word[place.dataset.title]);
  }
}
