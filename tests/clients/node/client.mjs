// The official client for JavaScript against a server: prints one JSON object of what it got.
import OpenAI from "openai";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 60_000 });
const model = "demo";
const prompt = "Once upon a time";
const found = {};

const whole = await client.completions.create({ model, prompt, max_tokens: 32, temperature: 0, logprobs: 2 });
found.whole = { text: whole.choices[0].text, usage: whole.usage, tokens: whole.choices[0].logprobs.tokens.length };

found.streamed = "";
const events = await client.completions.create({ model, prompt, max_tokens: 32, temperature: 0, stream: true });
for await (const event of events) found.streamed += event.choices[0].text;

const messages = [{ role: "user", content: "Tell a story." }];
const chat = await client.chat.completions.create({ model, messages, max_completion_tokens: 24, temperature: 0 });
found.chat = chat.choices[0].message;

const runner = client.chat.completions.stream({ model, messages, max_completion_tokens: 24, temperature: 0 });
found.chatStreamed = (await runner.finalChatCompletion()).choices[0].message.content;

const schema = { type: "object", properties: { a: { type: "boolean" } }, required: ["a"], additionalProperties: false };
const format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
const held = await client.chat.completions.create({ model, messages, max_completion_tokens: 60, response_format: format });
found.structured = JSON.parse(held.choices[0].message.content);

found.models = (await client.models.list()).data.map((each) => each.id);

try {
  await client.completions.create({ model, prompt, temperature: 9 });
} catch (error) {
  found.error = { name: error.constructor.name, status: error.status, param: error.param };
}
try {
  await client.completions.create({ model: "another", prompt });
} catch (error) {
  found.missing = { name: error.constructor.name, status: error.status, code: error.code };
}

const endless = await client.completions.create({ model, prompt, max_tokens: 4000, stream: true });
let count = 0;
for await (const _ of endless) {
  count += 1;
  if (count === 3) break; // which aborts the request
}
found.left = count;
console.log(JSON.stringify(found));
