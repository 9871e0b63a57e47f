// Generate greedily from a local folder: node generate.mjs ROOT NAME TOKENS OPTIONS PROMPT...
// OPTIONS are those of from_pretrained, as JSON; a list of them loads the folder once for each.
// Prints one JSON document: for each prompt (and each of the options) its ids and the ids that follow.
import { AutoModelForCausalLM, AutoTokenizer, env } from '@huggingface/transformers';

const [root, name, tokens, options, ...prompts] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = root;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const results = [];
for (const option of [JSON.parse(options)].flat()) {
  const model = await AutoModelForCausalLM.from_pretrained(name, { device: 'cpu', ...option });
  for (const prompt of prompts) {
    const inputs = tokenizer(prompt);
    const all = await model.generate({ ...inputs, max_new_tokens: Number(tokens), do_sample: false });
    const ids = Array.from(inputs.input_ids.data, Number);
    results.push({ ids, made: Array.from(all.data, Number).slice(ids.length) });
  }
  await model.dispose();
}
console.log(JSON.stringify(results));
