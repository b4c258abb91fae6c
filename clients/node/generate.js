// Streams answers from an Octavo cluster, first by Generate (one request a call), then by Session (many over one stream).
// The .proto files are all that it needs.
//
//   node generate.js [HOST:PORT] [PROMPT]
"use strict";

const { randomBytes } = require("node:crypto");
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const PROTOS = path.join(__dirname, "..", "..", "protos");
const definition = protoLoader.loadSync("octavo/v1/inference_service.proto", {
  includeDirs: [PROTOS],
  enums: String,
  longs: String,
  oneofs: true,
  defaults: true,
});
const { octavo } = grpc.loadPackageDefinition(definition);

function request(text) {
  return { prompt: { text }, maxTokens: 16, sampling: { temperature: 0 } };
}

// Prints an answer as it comes; resolves to its usage, rejects with the call's status. `octavo trace TRACE_ID` explains
// the request; in a service that traces itself the traceparent is the one of its current span.
function generate(client, text, traceId) {
  return new Promise((resolve, reject) => {
    let usage = null;
    const metadata = new grpc.Metadata();
    metadata.set("traceparent", `00-${traceId}-${randomBytes(8).toString("hex")}-01`);
    const call = client.Generate(request(text), metadata, { deadline: Date.now() + 60_000 });
    process.stdout.write("generate: ");
    call.on("data", (response) => {
      for (const delta of response.deltas) process.stdout.write(delta.text);
      usage = response.usage ?? usage;
    });
    call.on("error", reject);
    call.on("end", () => {
      process.stdout.write("\n");
      resolve(usage);
    });
  });
}

// Sends every prompt over one stream; resolves to {request id: text} when each has its terminal.
function session(client, prompts) {
  return new Promise((resolve, reject) => {
    const texts = {};
    let running = 0;
    const call = client.Session();
    call.on("error", reject);
    call.on("end", () => resolve(texts));
    call.on("data", (response) => {
      for (const event of response.events) {
        if (event.delta) {
          texts[event.requestId] += event.delta.text;
          continue;
        }
        const { code, reason, message } = event.terminal;
        if (code !== 0) reject(new Error(`${event.requestId}: ${reason}: ${message}`));
        running -= 1;
      }
      if (running === 0) call.end();
    });
    const starts = prompts.map((text, i) => {
      const requestId = `node-${process.pid}-${i}`;
      texts[requestId] = "";
      running += 1;
      return { requestId, request: request(text), timeout: { seconds: 60 } };
    });
    call.write({ starts });
  });
}

async function main(address, prompt) {
  const client = new octavo.v1.InferenceService(address, grpc.credentials.createInsecure());
  try {
    const traceId = randomBytes(16).toString("hex");
    const usage = await generate(client, prompt, traceId);
    console.log(`usage: ${usage.promptTokens} prompt, ${usage.generatedTokens} generated tokens; trace ${traceId}`);
    const texts = await session(client, [prompt, "Once upon a time"]);
    for (const text of Object.values(texts)) console.log(`session: ${text}`);
  } finally {
    client.close();
  }
}

const [address = "127.0.0.1:50051", prompt = "The capital of France is"] = process.argv.slice(2);
main(address, prompt).catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
