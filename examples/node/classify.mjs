// Classify images with a file of `glit export --preprocess`: node classify.mjs MODEL.onnx IMAGE...
import { readFile } from "node:fs/promises";
import ort from "onnxruntime-node";
import sharp from "sharp";

const [model, ...images] = process.argv.slice(2);
if (images.length === 0) {
  console.error("usage: node classify.mjs MODEL.onnx IMAGE...");
  process.exit(2);
}
const session = await ort.InferenceSession.create(model);
const { class_names: names, multilabel } = JSON.parse(await readFile(`${model}.json`)).info;

// The pixels of a file as the graph takes them: uint8 [1, height, width, 3], upright, over white.
async function pixelsOf(file) {
  const image = sharp(file, { ignoreIcc: true }).rotate().flatten({ background: "white" }).toColourspace("srgb");
  const { data, info } = await image.raw().toBuffer({ resolveWithObject: true });
  return new ort.Tensor("uint8", data, [1, info.height, info.width, 3]);
}

for (const file of images) {
  const { logits } = await session.run({ images: await pixelsOf(file) });
  const powers = Array.from(logits.data, multilabel
    ? logit => 1 / (1 + Math.exp(-logit))
    : logit => Math.exp(logit - Math.max(...logits.data)));
  const total = multilabel ? 1 : powers.reduce((sum, power) => sum + power);
  const order = [...powers.keys()].sort((a, b) => powers[b] - powers[a]).slice(0, 3);
  console.log(file);
  for (const index of order) {
    console.log(`  ${(100 * powers[index] / total).toFixed(1).padStart(5)} %  ${names ? names[index] : index}`);
  }
}
