// What nvidia-smi tells of a GPU beside its identity: memory that was lost, parts that MIG made, values that move. An
// unknown value is absent, and never 0; where nothing of a group is known, the group is absent.

import { create } from "@bufbuild/protobuf";
import {
  EccCountsSchema,
  GpuEccSchema,
  GpuProcessSchema,
  GpuTelemetrySchema,
  MigDeviceSchema,
  RemappedRowsSchema,
  RetiredPagesSchema,
} from "@clodei/proto/gen/clodei/v1/inventory";
import type {
  EccCounts,
  GpuEcc,
  GpuProcess,
  GpuTelemetry,
  MigDevice,
  RemappedRows,
  RetiredPages,
} from "@clodei/proto/gen/clodei/v1/inventory";
import { bare, child, decimalIn, elements, flagIn, known, numberIn, textOf } from "./nvidia-xml.ts";
import type { XmlNode } from "./nvidia-xml.ts";

const maxMigDevices = 64;
const maxProcesses = 256;
const maxThrottleReasons = 32;

/** What error correction counted; undefined where it is off or not there. */
export function eccOf(gpu: XmlNode): GpuEcc | undefined {
  const errors = child(gpu, "ecc_errors");
  const [volatile, aggregate] = [countsOf(child(errors, "volatile")), countsOf(child(errors, "aggregate"))];
  return volatile === undefined && aggregate === undefined
    ? undefined
    : create(GpuEccSchema, { ...defined({ volatile, aggregate }) });
}

/** Pages that were taken out of use. */
export function retiredPagesOf(gpu: XmlNode): RetiredPages | undefined {
  const pages = child(gpu, "retired_pages");
  return whereAny(
    {
      corrected: numberIn(textOf(child(pages, "multiple_single_bit_retirement"), "retired_count"), ""),
      uncorrected: numberIn(textOf(child(pages, "double_bit_retirement"), "retired_count"), ""),
      // Its name until 2020.
      pending: flagIn(textOf(pages, "pending_retirement")) ?? flagIn(textOf(pages, "pending_blacklist")),
    },
    (values) => create(RetiredPagesSchema, values),
  );
}

/** Rows that were replaced. */
export function remappedRowsOf(gpu: XmlNode): RemappedRows | undefined {
  const rows = child(gpu, "remapped_rows");
  return whereAny(
    {
      corrected: numberIn(textOf(rows, "remapped_row_corr"), ""),
      uncorrected: numberIn(textOf(rows, "remapped_row_unc"), ""),
      pending: flagIn(textOf(rows, "remapped_row_pending")),
      failed: flagIn(textOf(rows, "remapped_row_failure")),
    },
    (values) => create(RemappedRowsSchema, values),
  );
}

/** The parts that MIG made. One without a number is left out: nobody could name it. */
export function migDevicesOf(gpu: XmlNode): MigDevice[] {
  return elements(child(gpu, "mig_devices"), "mig_device")
    .slice(0, maxMigDevices)
    .flatMap((device) => {
      const index = numberIn(textOf(device, "index"), "");
      if (index === undefined) return [];
      const shared = child(device, "device_attributes", "shared");
      return create(MigDeviceSchema, {
        index,
        ...defined({
          gpuInstanceId: numberIn(textOf(device, "gpu_instance_id"), ""),
          computeInstanceId: numberIn(textOf(device, "compute_instance_id"), ""),
          memoryMib: numberIn(textOf(child(device, "fb_memory_usage"), "total"), "MiB"),
          multiprocessorCount: numberIn(textOf(shared, "multiprocessor_count"), ""),
        }),
      });
    });
}

/** What moves. */
export function telemetryOf(gpu: XmlNode): GpuTelemetry {
  const utilization = child(gpu, "utilization");
  const temperature = child(gpu, "temperature");
  const clocks = child(gpu, "clocks");
  return create(GpuTelemetrySchema, {
    ...defined({
      utilizationPercent: numberIn(textOf(utilization, "gpu_util"), "%"),
      memoryUtilizationPercent: numberIn(textOf(utilization, "memory_util"), "%"),
      memoryUsedMib: numberIn(textOf(child(gpu, "fb_memory_usage"), "used"), "MiB"),
      powerWatts: powerOf(gpu, ["power_draw", "instant_power_draw", "average_power_draw"]),
      powerLimitWatts: powerOf(gpu, ["current_power_limit", "power_limit", "enforced_power_limit"]),
      temperatureCelsius: numberIn(textOf(temperature, "gpu_temp"), "C"),
      memoryTemperatureCelsius: numberIn(textOf(temperature, "memory_temp"), "C"),
      smClockMhz: numberIn(textOf(clocks, "sm_clock"), "MHz"),
      memoryClockMhz: numberIn(textOf(clocks, "mem_clock"), "MHz"),
    }),
    performanceState: /^P[0-9]{1,2}$/.exec(textOf(gpu, "performance_state"))?.[0] ?? "",
    throttleReasons: throttleReasonsOf(gpu),
    processes: elements(child(gpu, "processes"), "process_info")
      .slice(0, maxProcesses)
      .flatMap((process) => processOf(process) ?? []),
  });
}

/** Under their names of the last years: "power_readings" became "gpu_power_readings", and its values moved as well. */
function powerOf(gpu: XmlNode, names: readonly string[]): number | undefined {
  for (const group of ["gpu_power_readings", "power_readings"]) {
    for (const name of names) {
      const watts = decimalIn(textOf(child(gpu, group), name), "W");
      if (watts !== undefined) return watts;
    }
  }
  return undefined;
}

/** Without the prefix, which changed from "clocks_throttle_reason_" to "clocks_event_reason_". An idle GPU is not held back. */
function throttleReasonsOf(gpu: XmlNode): string[] {
  const reasons = child(gpu, "clocks_event_reasons") ?? child(gpu, "clocks_throttle_reasons") ?? {};
  return Object.entries(reasons)
    .filter(([, value]) => typeof value === "string" && bare(value) === "active")
    .map(([name]) => name.replace(/^clocks_(event|throttle)_reason_/, "").slice(0, 64))
    .filter((name) => name !== "gpu_idle")
    .slice(0, maxThrottleReasons);
}

function processOf(process: XmlNode): GpuProcess | undefined {
  const pid = numberIn(textOf(process, "pid"), "");
  if (pid === undefined) return undefined;
  return create(GpuProcessSchema, {
    pid,
    type: (known(textOf(process, "type")) ?? "").slice(0, 8),
    ...defined({ memoryUsedMib: numberIn(textOf(process, "used_memory"), "MiB") }),
  });
}

function countsOf(counts: XmlNode | undefined): EccCounts | undefined {
  // Up to v11 by "single_bit" and "double_bit" with a total each; then by memory, corrected or not.
  const bits = { corrected: child(counts, "single_bit"), uncorrected: child(counts, "double_bit") };
  return whereAny(
    {
      corrected: bigCount(numberIn(textOf(bits.corrected, "total"), "") ?? sumOf(counts, /_correctable$/)),
      uncorrected: bigCount(numberIn(textOf(bits.uncorrected, "total"), "") ?? sumOf(counts, /_uncorrectable/)),
    },
    (values) => create(EccCountsSchema, values),
  );
}

/**
 * The sum of the counters whose names match, as far as they are known; undefined where none is. Boards that count for
 * one memory only say N/A for the other: their errors must be seen all the same.
 */
function sumOf(counts: XmlNode | undefined, name: RegExp): number | undefined {
  const values = Object.entries(counts ?? {})
    .filter(([key]) => name.test(key))
    .flatMap(([, value]) => (typeof value === "string" ? (numberIn(value, "") ?? []) : []));
  return values.length === 0 ? undefined : values.reduce((sum, value) => sum + value, 0);
}

function bigCount(value: number | undefined): bigint | undefined {
  return value === undefined ? undefined : BigInt(value);
}

type Defined<T extends object> = { [K in keyof T]?: Exclude<T[K], undefined> };

/** Only the fields that have a value. */
function defined<T extends object>(values: T): Defined<T> {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as Defined<T>;
}

/** A message of the fields that have a value; undefined where none has. */
function whereAny<T extends object, M>(values: T, message: (values: Defined<T>) => M): M | undefined {
  const known = defined(values);
  return Object.keys(known).length === 0 ? undefined : message(known);
}
