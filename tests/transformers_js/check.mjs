// Loads an encoder bundle, as it is, with transformers.js and prints one JSON object:
// node check.mjs FOLDER_OF_BUNDLES BUNDLE TEXT...
// To be run where `npm install --ignore-scripts @huggingface/transformers` was done.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const entry = createRequire(process.cwd() + "/").resolve("@huggingface/transformers");
const { env, pipeline, AutoTokenizer, AutoModel } = await import(
  pathToFileURL(entry)
);
env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const bundle = process.argv[3];
const texts = process.argv.slice(4);
const options = { dtype: "q8" };

const classify = await pipeline("text-classification", bundle, options);
const found = [];
for (const text of texts) {
  found.push(await classify(text, { top_k: null }));
}
const tokenizer = await AutoTokenizer.from_pretrained(bundle);
const model = await AutoModel.from_pretrained(bundle, options);
const rows = [];
for (const text of texts) {
  const answer = await model(await tokenizer(text, { truncation: true }));
  rows.push({
    logits: Array.from(answer.logits.data),
    embedding: Array.from(answer.sentence_embedding.data),
  });
}
console.log(JSON.stringify({ version: env.version, found, rows }));
process.exit(0);
