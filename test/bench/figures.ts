// What a bench prints: one line of JSON a figure.

/** A measured figure, against a baseline of the same run where there is one. */
export interface Figure {
  readonly bench: string;
  readonly metric: string;
  readonly value: number;
  readonly unit: string;
  readonly baseline: number | null;
  /** value ÷ baseline. */
  readonly ratio: number | null;
  readonly goal: string;
  readonly ok: boolean;
}

/** The value below which the share of the values lies, by the nearest rank. */
export function quantile(values: readonly number[], share: number): number {
  const sorted = values.toSorted((left, right) => left - right);
  const value = sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)];
  if (value === undefined) throw new Error("no values were measured");
  return value;
}

/** Three digits behind the point say more than any of these machines can measure. */
export function rounded(value: number): number {
  return Math.round(value * 1000) / 1000;
}

export function printFigure(figure: Figure): void {
  console.log(JSON.stringify(figure));
}
