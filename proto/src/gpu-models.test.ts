import assert from "node:assert/strict";
import { test } from "node:test";
import { gpuModelOf, maxGpusPerNode, parseSimulatedGpus, simulatedGpu } from "./gpu-models.ts";

test("names that nvidia-smi prints have their models", () => {
  const cases: [string, string][] = [
    ["NVIDIA H100 80GB HBM3", "H100-SXM"],
    ["NVIDIA H100 PCIe", "H100-PCIE"],
    ["NVIDIA H200", "H200-SXM"],
    ["NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"],
    ["A100-SXM4-40GB", "A100-SXM4-40GB"],
    ["NVIDIA L40S", "L40S"],
    ["Tesla T4", "T4"],
    ["NVIDIA GeForce RTX 4090", "RTX-4090"],
    ["GeForce RTX 3080", "RTX-3080"],
    ["NVIDIA GB200", "GB200"],
    ["  nvidia  h100 pcie ", "H100-PCIE"],
  ];
  for (const [productName, model] of cases) assert.equal(gpuModelOf(productName), model, productName);
});

test("products that are near a known one are unknown", () => {
  for (const productName of [
    "",
    "NVIDIA",
    "NVIDIA H100",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA L40S-24Q",
    "Quadro P400",
    "GRID A100-10C",
  ]) {
    assert.equal(gpuModelOf(productName), undefined, productName);
  }
});

test("every model is a slug that requests accept, and its product is of that model", () => {
  for (const gpu of parseSimulatedGpus("1xH100-SXM,1xH200-SXM,1xB200,1xRTX-PRO-6000-SERVER,1xT4")) {
    assert.match(gpu.model, /^[A-Z0-9]([A-Z0-9-]{0,38}[A-Z0-9])?$/);
    assert.equal(gpuModelOf(gpu.productName), gpu.model);
    assert.ok(gpu.memoryMib > 1024);
  }
});

test("what is to be simulated is one entry for each GPU, in order", () => {
  assert.deepEqual(
    parseSimulatedGpus("2xH100-SXM, 1xL40S").map((gpu) => gpu.model),
    ["H100-SXM", "H100-SXM", "L40S"],
  );
  assert.equal(simulatedGpu("H100-SXM")?.memoryMib, 81559);
  assert.equal(simulatedGpu("H1000"), undefined);
});

test("what cannot be simulated is refused, and the models are named", () => {
  for (const text of [
    "",
    "H100-SXM",
    "0xH100-SXM",
    "8xH1000",
    "8 x H100-SXM",
    "8xh100-sxm",
    "8xH100-SXM,",
    "100xH100-SXM",
    "-1xL4",
    "8xH100-SXM;4xL4",
  ]) {
    assert.throws(
      () => parseSimulatedGpus(text),
      (error: unknown) => error instanceof RangeError && error.message.includes("L40S"),
      text,
    );
  }
  assert.throws(() => parseSimulatedGpus(`${maxGpusPerNode}xL4,1xL4`), /65 GPUs are more than 64/);
});
