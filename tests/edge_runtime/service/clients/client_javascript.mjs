// The openai package for JavaScript, and Vercel's AI SDK. Prints the name of each check that passed, as contract.py.
import assert from "node:assert";
import OpenAI from "openai";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

const { url, model, text } = JSON.parse(process.argv[2]);
const baseURL = `${url}/v1`;
const question = "import os";
const messages = [{ role: "user", content: question }];
const limit = 16;
const weather = {
  type: "object",
  properties: { place: { enum: ["Rome", "Oslo"] }, days: { enum: [1, 2] } },
  required: ["place", "days"],
  additionalProperties: false,
};
const weatherTool = { type: "function", function: { name: "get_weather", parameters: weather } };

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const chat = (fields) => client.chat.completions.create({ model, messages, temperature: 0, ...fields });
const sdk = createOpenAICompatible({ name: "board", baseURL, supportsStructuredOutputs: true, includeUsage: true });
const ask = { model: sdk(model), prompt: question, temperature: 0, maxRetries: 0 };

function checkArguments(value) {
  assert.deepStrictEqual(Object.keys(value).sort(), ["days", "place"]);
  assert(["Rome", "Oslo"].includes(value.place) && [1, 2].includes(value.days));
}

async function countCancelled() {
  const lines = (await (await fetch(`${url}/metrics`)).text()).split("\n");
  const counts = lines.filter((line) => line.includes('outcome="cancelled"'));
  return counts.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

const checks = {
  async list() {
    const names = [];
    for await (const each of client.models.list()) names.push(each.id);
    assert.deepStrictEqual(names, [model]);
  },
  async chat() {
    const answer = await chat({ max_tokens: limit });
    assert.strictEqual(answer.choices[0].message.content, text);
    assert(Number.isSafeInteger(answer.seed));
    const result = await generateText({ ...ask, maxOutputTokens: limit });
    assert.strictEqual(result.text, text);
    assert.strictEqual(result.usage.outputTokens, limit);
  },
  async stream() {
    let streamed = "";
    for await (const chunk of await chat({ max_tokens: limit, stream: true })) {
      streamed += chunk.choices[0].delta.content ?? "";
    }
    assert.strictEqual(streamed, text);
    streamed = "";
    for await (const piece of streamText({ ...ask, maxOutputTokens: limit }).textStream) streamed += piece;
    assert.strictEqual(streamed, text);
  },
  async tools() {
    const answer = await chat({ tools: [weatherTool], tool_choice: "required", parallel_tool_calls: false });
    checkArguments(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments));
    const get_weather = tool({ description: "The weather.", inputSchema: jsonSchema(weather) });
    const choice = { type: "tool", toolName: "get_weather" };
    checkArguments((await generateText({ ...ask, tools: { get_weather }, toolChoice: choice })).toolCalls[0].input);
  },
  async structured() {
    const form = { type: "json_schema", json_schema: { name: "weather", schema: weather, strict: true } };
    checkArguments(JSON.parse((await chat({ response_format: form })).choices[0].message.content));
    checkArguments((await generateObject({ ...ask, schema: jsonSchema(weather) })).object);
  },
  async logprobs() {
    const answer = await chat({ max_tokens: limit, logprobs: true, top_logprobs: 2 });
    assert.strictEqual(answer.choices[0].logprobs.content.map((token) => token.token).join(""), text);
  },
  async cancel() {
    const before = await countCancelled();
    for await (const _ of await chat({ stream: true, ignore_eos: true })) break;
    while ((await countCancelled()) <= before) await new Promise((resolve) => setTimeout(resolve, 20));
  },
  async history() {
    const history = [...messages, { role: "assistant", content: text }, { role: "user", content: "more" }];
    assert((await chat({ messages: history, max_tokens: limit })).usage.prompt_tokens > limit);
  },
  async errors() {
    await assert.rejects(chat({ model: "nobody" }), { status: 404, code: "model_not_found" });
    const long = [{ role: "user", content: "x ".repeat(9000) }];
    await assert.rejects(chat({ messages: long }), { status: 400, code: "context_length_exceeded" });
    await assert.rejects(generateText({ ...ask, model: sdk("nobody") }), { statusCode: 404 });
  },
  async responses() {
    const fields = { model, input: question, max_output_tokens: limit, temperature: 0 };
    const first = await client.responses.create(fields);
    assert.strictEqual(first.output_text, text);
    let streamed = "";
    for await (const event of await client.responses.create({ ...fields, stream: true })) {
      if (event.type === "response.output_text.delta") streamed += event.delta;
    }
    assert.strictEqual(streamed, text);
    const second = await client.responses.create({ ...fields, input: "more", previous_response_id: first.id });
    assert(second.usage.input_tokens > first.usage.input_tokens + limit);
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(name);
}
