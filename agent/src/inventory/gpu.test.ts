import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { chmod, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { create } from "@bufbuild/protobuf";
import { createValidator } from "@bufbuild/protovalidate";
import { parseSimulatedGpus } from "@clodei/proto/gpu-models";
import { GpuHealth, GpuTelemetrySchema, MigMode, NodeInventorySchema } from "@clodei/proto/gen/clodei/v1/inventory";
import type { Gpu } from "@clodei/proto/gen/clodei/v1/inventory";
import { readGpus, simulateGpus } from "./gpu.ts";
import { readHost } from "./host.ts";
import { Inventory } from "./inventory.ts";
import { parseNvidiaSmi } from "./nvidia-smi.ts";
import { readSimulatedHealth } from "./simulated-health.ts";
import { noGpus } from "./readings.ts";

interface Fields {
  readonly uuid?: string;
  readonly name?: string;
  readonly memory?: string;
  readonly mig?: string;
  readonly more?: string;
}

/** One device as the tool documents it, cut down to what is read. */
function gpuXml(fields: Fields = {}): string {
  const {
    uuid = "GPU-11111111-2222-3333-4444-555555555555",
    name = "NVIDIA H100 80GB HBM3",
    memory = "81559 MiB",
    mig = "Disabled",
    more = "",
  } = fields;
  return `<gpu id="00000000:1B:00.0"><product_name>${name}</product_name><mig_mode><current_mig>${mig}</current_mig></mig_mode>
    <uuid>${uuid}</uuid><pci><pci_bus_id>00000000:1B:00.0</pci_bus_id></pci>
    <fb_memory_usage><total>${memory}</total><used>12 MiB</used></fb_memory_usage>
    <utilization><gpu_util>7 %</gpu_util></utilization>${more}</gpu>`;
}

function documentOf(...gpus: readonly string[]): string {
  return `<?xml version="1.0" ?><!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v13.dtd"><nvidia_smi_log>
    <driver_version>580.65.06</driver_version><cuda_version>13.0</cuda_version>${gpus.join("")}</nvidia_smi_log>`;
}

function one(xml: string): Gpu {
  const { gpus } = parseNvidiaSmi(xml);
  assert.equal(gpus.length, 1);
  const [gpu] = gpus;
  assert.ok(gpu !== undefined);
  return gpu;
}

describe("the output of nvidia-smi", () => {
  it("is read field by field", () => {
    const gpu = one(documentOf(gpuXml()));
    assert.equal(gpu.uuid, "GPU-11111111-2222-3333-4444-555555555555");
    assert.deepEqual(
      [gpu.model, gpu.memoryMib, gpu.driverVersion, gpu.cudaVersion],
      ["H100-SXM", 81559, "580.65.06", "13.0"],
    );
    assert.deepEqual(
      [gpu.pciAddress, gpu.migMode, gpu.health],
      ["00000000:1B:00.0", MigMode.DISABLED, GpuHealth.HEALTHY],
    );
    assert.deepEqual([gpu.telemetry?.utilizationPercent, gpu.telemetry?.memoryUsedMib, gpu.simulated], [7, 12, false]);
  });

  it("costs one field where one field is not known", () => {
    for (const unknown of ["N/A", "[N/A]", "[Not Supported]", ""]) {
      const gpu = one(documentOf(gpuXml({ mig: unknown, more: `<performance_state>${unknown}</performance_state>` })));
      assert.equal(gpu.memoryMib, 81559);
      assert.equal(gpu.health, GpuHealth.HEALTHY);
      assert.equal(
        gpu.migMode,
        unknown === ""
          ? MigMode.UNSPECIFIED
          : unknown === "N/A" || unknown === "[N/A]" || unknown === "[Not Supported]"
            ? MigMode.UNSUPPORTED
            : MigMode.UNSPECIFIED,
      );
    }
  });

  it("shows a device in trouble as not healthy, in the tool's own words", () => {
    const cases: [Fields, RegExp][] = [
      [{ memory: "ERR!" }, /memory: ERR!/],
      [{ memory: "[Unknown Error]" }, /Unknown Error/],
      [{ name: "[GPU is lost]" }, /GPU is lost/],
      [{ more: "<gpu_recovery_action>Reset</gpu_recovery_action>" }, /recovery action: Reset/],
      [{ more: "<remapped_rows><remapped_row_failure>Yes</remapped_row_failure></remapped_rows>" }, /remapping failed/],
      [
        { more: "<remapped_rows><remapped_row_pending>Yes</remapped_row_pending></remapped_rows>" },
        /waits for a reset/,
      ],
      [
        { more: "<ecc_errors><volatile><dram_uncorrectable>5</dram_uncorrectable></volatile></ecc_errors>" },
        /5 uncorrected/,
      ],
      [
        { more: "<ecc_errors><volatile><double_bit><total>2</total></double_bit></volatile></ecc_errors>" },
        /2 uncorrected/,
      ],
    ];
    for (const [fields, message] of cases) {
      const gpu = one(documentOf(gpuXml(fields)));
      assert.equal(gpu.health, GpuHealth.UNHEALTHY);
      assert.match(gpu.healthMessage, message);
    }
  });

  it("takes corrected and aggregate errors for what they are: the past", () => {
    const more =
      "<ecc_errors><volatile><dram_correctable>9</dram_correctable></volatile><aggregate><dram_uncorrectable>8</dram_uncorrectable></aggregate></ecc_errors>";
    assert.equal(one(documentOf(gpuXml({ more }))).health, GpuHealth.HEALTHY);
  });

  it("leaves out a device that has no name of its own, and says so", () => {
    for (const uuid of ["ERR!", "", "GPU-SIM-real", "GPU-a b"]) {
      const { gpus, error } = parseNvidiaSmi(documentOf(gpuXml({ uuid }), gpuXml()));
      assert.equal(gpus.length, 1);
      assert.notEqual(error, "");
    }
    assert.match(parseNvidiaSmi(documentOf(gpuXml(), gpuXml())).error, /twice/);
  });

  it("may be anything: that is an error and no crash", () => {
    for (const text of [
      "",
      "No devices were found",
      "<nvidia_smi_log>",
      "<a/>",
      "\0",
      documentOf(gpuXml()).slice(0, 300),
    ]) {
      const { gpus, error } = parseNvidiaSmi(text);
      assert.deepEqual(gpus, []);
      assert.notEqual(error, "");
    }
    assert.deepEqual(parseNvidiaSmi(documentOf()), { gpus: [], error: "" });
  });
});

const samples = join(import.meta.dirname, "../../../../shared/data/gpu-samples");

interface TruthOfGpu {
  readonly uuid: string;
  readonly name: string;
  readonly bus_id: string;
  readonly mem_total_mib: number;
  readonly mem_used_mib: number | null;
  readonly mig_mode: string | null;
  readonly mig_devices: number;
  readonly mig_mem_mib: readonly (number | null)[];
  readonly gpu_util_pct: number | null;
  readonly temp_c: number | null;
  readonly power_w: number | null;
  readonly power_limit_w: number | null;
  readonly ecc_uncorr_volatile: number | null;
  readonly ecc_uncorr_aggregate: number | null;
  readonly processes: number;
}

interface Truth {
  readonly driver: string | null;
  readonly gpus: readonly TruthOfGpu[];
}

/** What we read of a device, as the independent reader writes it. */
function asTruth(gpu: Gpu | undefined): Omit<TruthOfGpu, "name" | "uuid" | "bus_id" | "mem_total_mib" | "mig_mode"> {
  const { telemetry, ecc, migDevices = [] } = gpu ?? {};
  const count = (value: bigint | undefined) => (value === undefined ? null : Number(value));
  return {
    mem_used_mib: telemetry?.memoryUsedMib ?? null,
    mig_devices: migDevices.length,
    mig_mem_mib: migDevices.map(({ memoryMib }) => memoryMib ?? null),
    gpu_util_pct: telemetry?.utilizationPercent ?? null,
    temp_c: telemetry?.temperatureCelsius ?? null,
    power_w: telemetry?.powerWatts ?? null,
    power_limit_w: telemetry?.powerLimitWatts ?? null,
    ecc_uncorr_volatile: count(ecc?.volatile?.uncorrected),
    ecc_uncorr_aggregate: count(ecc?.aggregate?.uncorrected),
    processes: telemetry?.processes.length ?? 0,
  };
}

describe(
  "outputs of real machines",
  { skip: existsSync(join(samples, "truth.json")) ? false : "the samples are not here" },
  () => {
    it("read as an independent reader read them", async () => {
      const truth = JSON.parse(await readFile(join(samples, "truth.json"), "utf8")) as Record<string, Truth>;
      const migModes: Record<string, MigMode> = { Enabled: MigMode.ENABLED, Disabled: MigMode.DISABLED };
      let seen = 0;
      for (const [file, { driver, gpus }] of Object.entries(truth)) {
        const { gpus: found, error } = parseNvidiaSmi(await readFile(join(samples, file), "utf8"));
        assert.equal(error, "", file);
        assert.deepEqual(
          found.map((gpu) => [gpu.uuid, gpu.productName, gpu.pciAddress, gpu.memoryMib, gpu.driverVersion]),
          gpus.map((gpu) => [gpu.uuid, gpu.name, gpu.bus_id, gpu.mem_total_mib, driver ?? ""]),
          file,
        );
        for (const [index, gpu] of gpus.entries()) {
          const read = found[index];
          const mode = gpu.mig_mode === null ? undefined : migModes[gpu.mig_mode];
          if (mode !== undefined) assert.equal(read?.migMode, mode, file);
          const mine = asTruth(read);
          const theirs = Object.fromEntries(Object.keys(mine).map((key) => [key, gpu[key as keyof typeof mine]]));
          assert.deepEqual(mine, theirs, `${file}, GPU ${index}`);
        }
        seen += found.length;
      }
      assert.ok(seen >= 17);
      const damaged = parseNvidiaSmi(await readFile(join(samples, "xml/nvidia-qx-gb200-ecc-injected.xml"), "utf8"));
      assert.deepEqual(
        damaged.gpus.map(({ health }) => health),
        [GpuHealth.UNHEALTHY, GpuHealth.HEALTHY],
      );
    });
  },
);

async function withTool(script: string, work: (path: string) => Promise<void>): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-smi-"));
  try {
    const path = join(folder, "tool");
    await writeFile(path, `#!/bin/sh\n${script}\n`);
    await chmod(path, 0o755);
    await work(path);
  } finally {
    await rm(folder, { recursive: true });
  }
}

const tools = { nvidiaSmi: "no-such-tool", rocmSmi: "no-such-tool-either", searchPath: "/usr/bin:/bin" };

describe("the tool itself", () => {
  it("is absent on a node without GPUs", async () => {
    assert.deepEqual(await readGpus(tools), { gpus: [], error: "" });
  });

  it("finds none, fails, or prints and fails: each is told apart", async () => {
    await withTool("echo 'No devices were found'; exit 6", async (nvidiaSmi) => {
      assert.deepEqual(await readGpus({ ...tools, nvidiaSmi }), { gpus: [], error: "" });
    });
    await withTool("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", async (nvidiaSmi) => {
      assert.match((await readGpus({ ...tools, nvidiaSmi })).error, /exit 18.*version mismatch/);
    });
    await withTool(`cat <<'X'\n${documentOf(gpuXml())}\nX\necho 'one GPU is lost' >&2; exit 15`, async (nvidiaSmi) => {
      const { gpus, error } = await readGpus({ ...tools, nvidiaSmi });
      assert.equal(gpus.length, 1);
      assert.match(error, /one GPU is lost/);
    });
  });

  it("tells how the GPUs are connected, and a table that is missing costs nothing else", async () => {
    const both = documentOf(gpuXml(), gpuXml({ uuid: "GPU-2" }));
    const asked = (topology: string) => `if [ "$1" = topo ]; then ${topology}; exit 0; fi\ncat <<'X'\n${both}\nX`;
    await withTool(asked("printf '\\tGPU0\\tGPU1\\nGPU0\\t X \\tNV18\\nGPU1\\tNV18\\t X \\n'"), async (nvidiaSmi) => {
      const { gpus } = await readGpus({ ...tools, nvidiaSmi });
      assert.deepEqual(
        gpus.map(({ links }) => links.map(({ uuid, kind }) => `${kind} ${uuid}`)),
        [["NV18 GPU-2"], ["NV18 GPU-11111111-2222-3333-4444-555555555555"]],
      );
    });
    await withTool(asked("echo 'no such option' >&2; exit 2"), async (nvidiaSmi) => {
      const { gpus, error } = await readGpus({ ...tools, nvidiaSmi });
      assert.deepEqual([gpus.length, gpus[0]?.links, error], [2, [], ""]);
    });
  });

  it("is there for each vendor, and one that fails hides nothing of the other", async () => {
    await withTool(`cat <<'X'\n${documentOf(gpuXml())}\nX`, async (nvidiaSmi) => {
      const card = { "Unique ID": "0x79ccd55167a2124a", "VRAM Total Memory (B)": "34342961152" };
      await withTool(`echo 'WARNING: old'; echo '${JSON.stringify({ card0: card })}'`, async (rocmSmi) => {
        const { gpus, error } = await readGpus({ ...tools, nvidiaSmi, rocmSmi });
        assert.deepEqual(
          [gpus.map(({ uuid, index }) => `${index} ${uuid}`), error],
          [["0 GPU-11111111-2222-3333-4444-555555555555", "1 GPU-79ccd55167a2124a"], ""],
        );
      });
      await withTool("echo 'no driver' >&2; exit 1", async (rocmSmi) => {
        const { gpus, error } = await readGpus({ ...tools, nvidiaSmi, rocmSmi });
        assert.equal(gpus.length, 1);
        assert.match(error, /exit 1.*no driver/);
      });
    });
  });

  it("hangs: the answer comes at the deadline", async () => {
    await withTool("exec sleep 300", async (nvidiaSmi) => {
      const begin = performance.now();
      const { error } = await readGpus({ ...tools, nvidiaSmi, timeoutMs: 200 });
      assert.match(error, /did not answer/);
      assert.ok(performance.now() - begin < 60_000);
    });
  });
});

describe("simulated GPUs", () => {
  it("say what they are, are the same after a restart, and are never another node's", () => {
    const models = parseSimulatedGpus("2xH100-SXM,1xL40S");
    const names = (node: string) => simulateGpus(models, node).gpus.map(({ uuid }) => uuid);
    assert.deepEqual(names("a"), names("a"));
    assert.equal(new Set([...names("a"), ...names("b")]).size, 6);
    for (const gpu of simulateGpus(models, "a").gpus) {
      assert.ok(gpu.simulated);
      assert.match(gpu.uuid, /^GPU-SIM-[0-9a-f]{32}$/);
    }
  });
});

describe("a file about the health of simulated GPUs", () => {
  it("makes those ill that it names, says that it is simulated, and is told where it cannot be read", async () => {
    const folder = await mkdtemp(join(tmpdir(), "clodei-health-"));
    try {
      const path = join(folder, "health.json");
      assert.equal((await readSimulatedHealth(path)).size, 0);
      await writeFile(path, '{"1": "GPU is lost"}');
      const { gpus } = simulateGpus(parseSimulatedGpus("2xH100-SXM"), "a", await readSimulatedHealth(path));
      assert.deepEqual(
        gpus.map(({ health, healthMessage }) => [health, healthMessage]),
        [
          [GpuHealth.HEALTHY, ""],
          [GpuHealth.UNHEALTHY, "simulated: GPU is lost"],
        ],
      );
      for (const text of ["", "[]", "1"]) {
        await writeFile(path, text);
        await assert.rejects(readSimulatedHealth(path), /simulated: .*health\.json/);
      }
    } finally {
      await rm(folder, { recursive: true });
    }
  });
});

describe("the inventory", () => {
  it("fits the contract, and tells of a change once", async () => {
    let readings = simulateGpus(parseSimulatedGpus("1xH100-SXM"), "a");
    const inventory = await Inventory.open({
      readGpus: async () => [readings],
      host: await readHost(),
      workspaceFolder: "/",
      dockerVersion: () => "20.10",
    });
    const result = createValidator().validate(NodeInventorySchema, inventory.current());
    assert.equal(result.kind, "valid");
    let changes = 0;
    using _listener = inventory.onChange(() => (changes += 1));
    await inventory.refresh();
    assert.equal(changes, 0);
    // What moves all the time is told with the next report, and makes none.
    const [gpu] = readings.gpus;
    assert.ok(gpu !== undefined);
    readings = { ...readings, gpus: [{ ...gpu, telemetry: create(GpuTelemetrySchema, { temperatureCelsius: 50 }) }] };
    await inventory.refresh();
    assert.deepEqual([changes, inventory.current().gpus[0]?.telemetry?.temperatureCelsius], [0, 50]);
    // The tool fails: the device that was there is not forgotten, and not offered.
    readings = { gpus: [], error: "driver mismatch" };
    await inventory.refresh();
    assert.equal(changes, 1);
    const { gpus, gpuError } = inventory.current();
    assert.deepEqual(
      [gpus[0]?.health, gpus[0]?.healthMessage, gpuError],
      [GpuHealth.UNHEALTHY, "driver mismatch", "driver mismatch"],
    );
    assert.equal(inventory.gpuStatuses()[0]?.health, GpuHealth.UNHEALTHY);
  });

  it("keeps a device of which the tool no longer tells, ill, beside its siblings, until the tool tells of it again", async () => {
    const all = simulateGpus(parseSimulatedGpus("3xH100-SXM"), "a");
    const [first, second, third] = all.gpus;
    assert.ok(first && second && third);
    let readings = all;
    const inventory = await Inventory.open({
      readGpus: async () => [readings],
      host: await readHost(),
      workspaceFolder: "/",
      dockerVersion: () => "20.10",
    });
    const ill = () =>
      inventory
        .current()
        .gpus.filter(({ health }) => health !== GpuHealth.HEALTHY)
        .map(({ uuid, healthMessage }) => [uuid, healthMessage]);
    // The driver counts those that are left anew.
    readings = { gpus: [first, { ...third, index: 1 }], error: "" };
    await inventory.refresh();
    assert.deepEqual(ill(), [[second.uuid, "the driver's tool no longer tells of it"]]);
    readings = { gpus: [first, third], error: "nvidia-smi: GPU is lost" };
    await inventory.refresh();
    assert.deepEqual(ill(), [[second.uuid, "nvidia-smi: GPU is lost"]]);
    readings = all;
    await inventory.refresh();
    assert.deepEqual(ill(), []);
  });

  it("tells a lost device by its own tool's words, and counts both tools' devices on", async () => {
    const [one, other] = [
      simulateGpus(parseSimulatedGpus("2xH100-SXM"), "a"),
      simulateGpus(parseSimulatedGpus("2xL40S"), "b"),
    ];
    let readings = [one, other];
    const inventory = await Inventory.open({
      readGpus: async () => readings,
      host: await readHost(),
      workspaceFolder: "/",
      dockerVersion: () => "20.10",
    });
    readings = [
      { gpus: [], error: "nvidia-smi: driver mismatch" },
      { gpus: other.gpus.slice(0, 1), error: "" },
    ];
    await inventory.refresh();
    const { gpus, gpuError } = inventory.current();
    assert.equal(gpuError, "nvidia-smi: driver mismatch");
    assert.deepEqual(
      gpus.map(({ index, healthMessage }) => [index, healthMessage]),
      [
        [0, "nvidia-smi: driver mismatch"],
        [1, "nvidia-smi: driver mismatch"],
        [2, ""],
        [3, "the driver's tool no longer tells of it"],
      ],
    );
    assert.deepEqual(
      inventory.gpuStatuses().map(({ uuid }) => uuid),
      gpus.map(({ uuid }) => uuid),
    );
  });

  it("keeps as many lost devices as there is room for, none of them in the place of one that works", async () => {
    const names = Array.from({ length: 200 }, (_, index) => `node-${index}`);
    const works = simulateGpus(parseSimulatedGpus("8xL40S"), "b");
    const others = names.map((name) => simulateGpus(parseSimulatedGpus("1xH100-SXM"), name));
    let look = 0;
    const inventory = await Inventory.open({
      readGpus: async () => [others[look++ % others.length] ?? noGpus, works],
      host: await readHost(),
      workspaceFolder: "/",
      dockerVersion: () => "20.10",
    });
    for (const _ of names) await inventory.refresh();
    const { gpus } = inventory.current();
    assert.equal(gpus.length, 64);
    const healthy = gpus.filter(({ health }) => health === GpuHealth.HEALTHY).map(({ uuid }) => uuid);
    assert.equal(healthy.length, 9);
    for (const { uuid } of works.gpus) assert.ok(healthy.includes(uuid));
  });
});
