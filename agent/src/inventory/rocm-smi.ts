// Reads what `rocm-smi --showallinfo --json` prints: an object for each card, by names that were respelled over the
// years, and values that are all text. AMD devices are shown and never placed on: containers get NVIDIA devices only.

import { create } from "@bufbuild/protobuf";
import { GpuHealth, GpuSchema, GpuTelemetrySchema } from "@clodei/proto/gen/clodei/v1/inventory";
import type { Gpu } from "@clodei/proto/gen/clodei/v1/inventory";
import { maxGpus } from "./readings.ts";
import type { GpuReadings } from "./readings.ts";

const bytesPerMib = 1024 * 1024;

/** A card's values by their names in lower case. */
type Card = ReadonlyMap<string, string>;

/** Parses the tool's JSON. Never throws: what cannot be read is told in `error`. */
export function parseRocmSmi(output: string): GpuReadings {
  const cards = parseCards(output);
  if (cards === undefined) return { gpus: [], error: "rocm-smi printed no valid JSON" };
  const driverVersion = known(cards.get("system")?.get("driver version")) ?? "";
  const gpus: Gpu[] = [];
  const errors: string[] = [];
  const numbered = [...cards].flatMap(([name, card]) => {
    const match = /^card([0-9]{1,3})$/.exec(name);
    return match === null ? [] : [{ number: Number(match[1]), card }];
  });
  for (const { number, card } of numbered.toSorted((left, right) => left.number - right.number)) {
    const gpu = readCard(card, number, driverVersion);
    if (typeof gpu === "string") errors.push(gpu);
    else if (gpus.some(({ uuid }) => uuid === gpu.uuid)) errors.push(`card${number}: its unique id appears twice`);
    else if (gpus.length < maxGpus) gpus.push(gpu);
  }
  return { gpus, error: errors.join("; ").slice(0, 1024) };
}

function parseCards(output: string): ReadonlyMap<string, Card> | undefined {
  // Warnings come before the document, on the same stream.
  const begin = output.indexOf("{");
  try {
    const parsed: unknown = JSON.parse(output.slice(Math.max(0, begin)));
    if (!isObject(parsed)) return undefined;
    return new Map(Object.entries(parsed).flatMap(([name, card]) => (isObject(card) ? [[name, cardOf(card)]] : [])));
  } catch {
    return undefined;
  }
}

function cardOf(values: object): Card {
  return new Map(
    Object.entries(values).flatMap(([name, value]): [string, string][] =>
      typeof value === "string" ? [[name.toLowerCase().replace(/:$/, ""), value.trim()]] : [],
    ),
  );
}

function isObject(value: unknown): value is object {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function readCard(card: Card, index: number, driverVersion: string): Gpu | string {
  const pciAddress = known(card.get("pci bus")) ?? "";
  // The name by which AMD's runtime selects it. A card of a desktop has none, and no two nodes may name one alike.
  const id = /^0x([0-9a-f]{1,16})$/i.exec(card.get("unique id") ?? "")?.[1];
  if (id === undefined) return `card${index}${pciAddress === "" ? "" : ` at ${pciAddress}`}: no unique id`;
  const memoryMib = mebibytes(card.get("vram total memory (b)"));
  const numaNode = whole(card.get("(topology) numa node"));
  const productName = known(card.get("card series")) ?? known(card.get("device name")) ?? "";
  return create(GpuSchema, {
    uuid: `GPU-${id.toLowerCase().padStart(16, "0")}`,
    productName: productName.slice(0, 128),
    memoryMib: memoryMib ?? 0,
    driverVersion: driverVersion.slice(0, 64),
    pciAddress: pciAddress.slice(0, 64),
    health: memoryMib === undefined ? GpuHealth.UNHEALTHY : GpuHealth.HEALTHY,
    healthMessage: memoryMib === undefined ? `memory: ${card.get("vram total memory (b)") ?? "not reported"}` : "",
    index,
    serial: (known(card.get("serial number")) ?? "").slice(0, 64),
    telemetry: telemetryOf(card),
    ...(numaNode === undefined ? {} : { numaNode }),
  });
}

function telemetryOf(card: Card) {
  const values = {
    utilizationPercent: whole(card.get("gpu use (%)")),
    memoryUtilizationPercent: whole(card.get("gpu memory read/write activity (%)")),
    memoryUsedMib: mebibytes(card.get("vram total used memory (b)")),
    powerWatts:
      decimal(card.get("average graphics package power (w)")) ??
      decimal(card.get("current socket graphics package power (w)")),
    powerLimitWatts: decimal(card.get("max graphics package power (w)")),
    // The hottest place of the chip, by which the driver slows it down.
    temperatureCelsius: whole(card.get("temperature (sensor junction) (c)")),
    memoryTemperatureCelsius: whole(card.get("temperature (sensor memory) (c)")),
    smClockMhz: megahertz(card.get("sclk clock speed")),
    memoryClockMhz: megahertz(card.get("mclk clock speed")),
  };
  return create(
    GpuTelemetrySchema,
    Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)),
  );
}

function known(value: string | undefined): string | undefined {
  return value === undefined || /^(|n\/a|none|unknown|unsupported)$/i.test(value) ? undefined : value;
}

function decimal(value: string | undefined): number | undefined {
  return value !== undefined && /^[0-9]{1,15}(\.[0-9]{1,9})?$/.test(value) ? Number(value) : undefined;
}

function whole(value: string | undefined): number | undefined {
  const number = decimal(value);
  return number === undefined || number > 0xffff_ffff ? undefined : Math.floor(number);
}

function mebibytes(value: string | undefined): number | undefined {
  const bytes = decimal(value);
  return bytes === undefined ? undefined : Math.min(Math.floor(bytes / bytesPerMib), 0xffff_ffff);
}

/** "(300Mhz)" */
function megahertz(value: string | undefined): number | undefined {
  return whole(/^\(([0-9.]+)mhz\)$/i.exec(value ?? "")?.[1]);
}
