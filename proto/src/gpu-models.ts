/**
 * GPU models as offers and requests name them: slugs, from the names that the vendors' tools print. A product
 * that is not in the table is shown to operators and never placed on.
 */

/** A model of GPU. */
export type GpuModel = {
  /** The slug: "H100-SXM". */
  readonly model: string;
  /** The name that nvidia-smi prints: "NVIDIA H100 80GB HBM3". */
  readonly productName: string;
  /** Memory as nvidia-smi reports it, in MiB. What a real GPU offers is what it reports itself. */
  readonly memoryMib: number;
};

/** More GPUs than any machine has: a limit on what may be simulated, and on what an inventory carries. */
export const maxGpusPerNode = 64;

// Several products may be one model. The first of a model is the one that is simulated.
const table: readonly GpuModel[] = [
  { model: "B300-SXM", productName: "NVIDIA B300 SXM6 AC", memoryMib: 275040 },
  { model: "GB200", productName: "NVIDIA GB200", memoryMib: 189471 },
  { model: "B200", productName: "NVIDIA B200", memoryMib: 183359 },
  { model: "GH200", productName: "NVIDIA GH200 480GB", memoryMib: 97871 },
  { model: "GH200-144GB", productName: "NVIDIA GH200 144G HBM3e", memoryMib: 146831 },
  { model: "H200-SXM", productName: "NVIDIA H200", memoryMib: 143771 },
  { model: "H200-NVL", productName: "NVIDIA H200 NVL", memoryMib: 143771 },
  { model: "H100-SXM", productName: "NVIDIA H100 80GB HBM3", memoryMib: 81559 },
  { model: "H100-PCIE", productName: "NVIDIA H100 PCIe", memoryMib: 81559 },
  { model: "H100-NVL", productName: "NVIDIA H100 NVL", memoryMib: 95830 },
  { model: "A100-SXM4-80GB", productName: "NVIDIA A100-SXM4-80GB", memoryMib: 81920 },
  { model: "A100-SXM4-40GB", productName: "NVIDIA A100-SXM4-40GB", memoryMib: 40960 },
  { model: "A100-PCIE-80GB", productName: "NVIDIA A100 80GB PCIe", memoryMib: 81920 },
  { model: "A100-PCIE-40GB", productName: "NVIDIA A100-PCIE-40GB", memoryMib: 40960 },
  { model: "A40", productName: "NVIDIA A40", memoryMib: 46068 },
  { model: "A30", productName: "NVIDIA A30", memoryMib: 24576 },
  { model: "A10", productName: "NVIDIA A10", memoryMib: 23028 },
  { model: "A10G", productName: "NVIDIA A10G", memoryMib: 23028 },
  { model: "A16", productName: "NVIDIA A16", memoryMib: 15356 },
  { model: "A2", productName: "NVIDIA A2", memoryMib: 15356 },
  { model: "L40S", productName: "NVIDIA L40S", memoryMib: 46068 },
  { model: "L40", productName: "NVIDIA L40", memoryMib: 46068 },
  { model: "L4", productName: "NVIDIA L4", memoryMib: 23034 },
  { model: "T4", productName: "Tesla T4", memoryMib: 15360 },
  { model: "T4", productName: "NVIDIA T4", memoryMib: 15360 },
  { model: "V100-SXM2-32GB", productName: "Tesla V100-SXM2-32GB", memoryMib: 32768 },
  { model: "V100-SXM2-16GB", productName: "Tesla V100-SXM2-16GB", memoryMib: 16384 },
  { model: "V100-PCIE-32GB", productName: "Tesla V100-PCIE-32GB", memoryMib: 32768 },
  { model: "V100-PCIE-16GB", productName: "Tesla V100-PCIE-16GB", memoryMib: 16384 },
  { model: "P100-PCIE-16GB", productName: "Tesla P100-PCIE-16GB", memoryMib: 16384 },
  { model: "RTX-PRO-6000-SERVER", productName: "NVIDIA RTX PRO 6000 Blackwell Server Edition", memoryMib: 97887 },
  { model: "RTX-PRO-6000", productName: "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", memoryMib: 97887 },
  { model: "RTX-6000-ADA", productName: "NVIDIA RTX 6000 Ada Generation", memoryMib: 49140 },
  { model: "RTX-A6000", productName: "NVIDIA RTX A6000", memoryMib: 49140 },
  { model: "RTX-A5000", productName: "NVIDIA RTX A5000", memoryMib: 24564 },
  { model: "RTX-A4000", productName: "NVIDIA RTX A4000", memoryMib: 16376 },
  { model: "RTX-5090", productName: "NVIDIA GeForce RTX 5090", memoryMib: 32607 },
  { model: "RTX-5080", productName: "NVIDIA GeForce RTX 5080", memoryMib: 16303 },
  { model: "RTX-4090", productName: "NVIDIA GeForce RTX 4090", memoryMib: 24564 },
  { model: "RTX-4080-SUPER", productName: "NVIDIA GeForce RTX 4080 SUPER", memoryMib: 16376 },
  { model: "RTX-4080", productName: "NVIDIA GeForce RTX 4080", memoryMib: 16376 },
  { model: "RTX-3090", productName: "NVIDIA GeForce RTX 3090", memoryMib: 24576 },
  { model: "RTX-3080", productName: "NVIDIA GeForce RTX 3080", memoryMib: 10240 },
];

/**
 * The model of a product, by the whole name and nothing near it: a guess would sell one GPU as another.
 * Older drivers leave "NVIDIA " away; letter case and runs of spaces do not matter.
 */
export function gpuModelOf(productName: string): string | undefined {
  const wanted = comparable(productName);
  return table.find((entry) => comparable(entry.productName) === wanted)?.model;
}

/** The product that stands for a model where it is simulated; undefined for an unknown model. */
export function simulatedGpu(model: string): GpuModel | undefined {
  return table.find((entry) => entry.model === model);
}

/**
 * Reads what an agent is told to simulate, into one entry for each GPU, in order.
 *
 * @throws RangeError that says what is allowed.
 * @example parseSimulatedGpus("8xH100-SXM,4xL40S") // 12 entries
 */
export function parseSimulatedGpus(text: string): readonly GpuModel[] {
  const gpus: GpuModel[] = [];
  for (const item of text.split(",")) {
    const [, countText = "", model = ""] = /^([1-9][0-9]?)x([A-Z0-9-]+)$/.exec(item.trim()) ?? [];
    const gpu = simulatedGpu(model);
    if (gpu === undefined) {
      const models = [...new Set(table.map((entry) => entry.model))].join(", ");
      throw new RangeError(`"${item}" is not of the form COUNTxMODEL with a known model. Models: ${models}`);
    }
    gpus.push(...Array.from({ length: Number(countText) }, () => gpu));
  }
  if (gpus.length > maxGpusPerNode) throw new RangeError(`${gpus.length} GPUs are more than ${maxGpusPerNode}`);
  return gpus;
}

function comparable(productName: string): string {
  return productName
    .trim()
    .replace(/\s+/g, " ")
    .toLowerCase()
    .replace(/^nvidia /, "");
}
