// Generate greedily from a local folder: node generate.mjs ROOT NAME TOKENS PROMPT...
// Prints one JSON document: for each prompt its ids and the ids that follow.
import { AutoModelForCausalLM, AutoTokenizer, env } from '@huggingface/transformers';

const [root, name, tokens, ...prompts] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = root;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, {
  subfolder: '', // the graph lies beside config.json
  use_external_data_format: true,
  dtype: 'fp32',
  device: 'cpu',
});
const results = [];
for (const prompt of prompts) {
  const inputs = tokenizer(prompt);
  const all = await model.generate({ ...inputs, max_new_tokens: Number(tokens), do_sample: false });
  const ids = Array.from(inputs.input_ids.data, Number);
  results.push({ ids, made: Array.from(all.data, Number).slice(ids.length) });
}
console.log(JSON.stringify(results));
