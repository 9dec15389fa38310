// The life of a fine-tuning job with OpenAI's Node client, unmodified: `node FILE URL KEY FOLDER MODEL CLIENT_FOLDER`.
// Prints what it saw as JSON; the test judges that.
import fs from "node:fs";
import { createHash } from "node:crypto";
import { createRequire } from "node:module";
import path from "node:path";

const [url, key, folder, model, clientFolder] = process.argv.slice(2);
const OpenAI = createRequire(path.join(clientFolder, "package.json"))("openai");
const { toFile } = OpenAI;
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 2, timeout: 60_000 });
const ENDED = ["succeeded", "failed", "cancelled"];
const seen = {};
const pause = () => new Promise((resolve) => setTimeout(resolve, 50));

async function until(id, wanted, statuses = []) {
  for (;;) {
    const job = await client.fineTuning.jobs.retrieve(id);
    if (statuses.at(-1) !== job.status) statuses.push(job.status);
    if (wanted.includes(job.status)) return job;
    if (ENDED.includes(job.status)) throw new Error(`${id} is ${job.status}: ${JSON.stringify(job.error)}`);
    await pause();
  }
}
async function all(list) {
  const found = [];
  for await (const one of list) found.push(one);
  return found;
}

const train = path.join(folder, "train.jsonl");
const made = await client.files.create({ file: fs.createReadStream(train), purpose: "fine-tune",
  expires_after: { anchor: "created_at", seconds: 7200 } });
seen.file_processed = (await client.files.waitForProcessing(made.id, { pollInterval: 50 })).status;
seen.file = await client.files.retrieve(made.id);
seen.content_is_equal = (await (await client.files.content(made.id)).text()) === fs.readFileSync(train, "utf8");
const ids = (await all(client.files.list({ limit: 1, order: "asc", purpose: "fine-tune" }))).map((file) => file.id);
seen.listed_files = ids.includes(made.id) && new Set(ids).size === ids.length;

const content = fs.readFileSync(train);
const upload = await client.uploads.create({ bytes: content.length, filename: "parts.jsonl", mime_type: "text/jsonl",
  purpose: "fine-tune", expires_after: { anchor: "created_at", seconds: 7200 } });
const part = await client.uploads.parts.create(upload.id, { data: await toFile(content, "part") });
const md5 = createHash("md5").update(content).digest("hex");
const complete = await client.uploads.complete(upload.id, { part_ids: [part.id], md5 });
seen.upload = [upload.status, complete.status, complete.file.bytes === content.length];
const other = await client.uploads.create({ bytes: 5, filename: "x.jsonl", mime_type: "text/jsonl", purpose: "fine-tune" });
seen.upload_cancelled = (await client.uploads.cancel(other.id)).status;

const created = await client.fineTuning.jobs.create({ model, training_file: made.id, suffix: "node", seed: 3,
  metadata: { client: "node" }, method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 1 } } } });
seen.statuses = [created.status];
const job = await until(created.id, ENDED, seen.statuses);
seen.job = job;
seen.events = (await all(client.fineTuning.jobs.listEvents(job.id, { limit: 2 }))).map((event) => event.message);
seen.checkpoints = (await all(client.fineTuning.jobs.checkpoints.list(job.id, { limit: 1 }))).map((one) => one.object);
seen.mine = (await all(client.fineTuning.jobs.list({ limit: 1, metadata: { client: "node" } }))).length;
seen.result_file = (await (await client.files.content(job.result_files[0])).text()).split("\n")[0];
seen.model = (await client.models.retrieve(job.fine_tuned_model)).id;
seen.is_listed = (await all(client.models.list())).some((one) => one.id === job.fine_tuned_model);
const answer = await client.chat.completions.create({ model: job.fine_tuned_model, messages: [{ role: "user", content: "Hi" }] });
seen.answer = answer.choices[0].message.content;

const held = await client.fineTuning.jobs.create({ model, training_file: made.id, suffix: "hold-node" });
await until(held.id, ["running"]);
await client.fineTuning.jobs.pause(held.id);
await until(held.id, ["paused"]);
await client.fineTuning.jobs.resume(held.id);
seen.resumed = (await until(held.id, ENDED)).status;
const ended = await client.fineTuning.jobs.create({ model, training_file: made.id, suffix: "hold-node-2" });
await client.fineTuning.jobs.cancel(ended.id);
seen.cancelled = (await until(ended.id, ENDED)).status;
try {
  await client.fineTuning.jobs.create({ model: "no-such-model", training_file: made.id });
} catch (error) {
  seen.error = [error.constructor.name, error.status, Boolean(error.code)];
}
seen.deleted = [(await client.models.delete(job.fine_tuned_model)).deleted, (await client.files.delete(made.id)).deleted];
console.log(JSON.stringify(seen));
