// OpenAI's npm client against an endpoint whose model counts. Run by tests.lab.serve_clients.
import { createRequire } from "node:module";

const [url, folder] = process.argv.slice(2);
const require = createRequire(`${folder}/x.js`);
const { OpenAI } = require("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
let checks = 0;

function check(condition, what) {
  checks += 1;
  if (!condition) {
    console.error(`failed: ${what}`);
    process.exit(1);
  }
}

const usual = { model: "counting", max_tokens: 3, temperature: 0 };
const messages = [{ role: "developer", content: "x" }, { role: "user", content: "ab" }];
const whole = await client.completions.create({ ...usual, prompt: ["ab", "mn"], logprobs: 5 });
check(whole.choices.map((choice) => choice.text).join() === "cde,opq", "a list of prompts");
check(Object.keys(whole.choices[0].logprobs.top_logprobs[0]).length === 5, "top_logprobs");
let text = "";
let used;
for await (const chunk of await client.completions.create({
  ...usual, prompt: "ab", stream: true, stream_options: { include_usage: true },
})) {
  text += chunk.choices[0]?.text ?? "";
  used = chunk.usage ?? used;
}
check(text === "cde" && used.completion_tokens === 3, "a stream and its usage");
const chat = await client.chat.completions.create({ ...usual, messages, n: 2 });
check(chat.choices.map((choice) => choice.message.content).join() === "cde,cde", "a chat");
const runner = client.chat.completions.stream({ ...usual, messages });
check((await runner.finalContent()) === "cde", "a chat's stream, gathered by the client");
for (const [wrong, status] of [[{ prompt: "a".repeat(2000) }, 400], [{ prompt: "a", model: "gpt-9" }, 404]]) {
  try {
    await client.completions.create({ ...usual, ...wrong });
    check(false, `a refusal with ${status}`);
  } catch (error) {
    check(error.status === status && error.code !== null, `a refusal with ${status}: ${error}`);
  }
}
const version = require(`${folder}/node_modules/openai/package.json`).version;
console.log(JSON.stringify({ version, checks }));
