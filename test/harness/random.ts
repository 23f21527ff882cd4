// Randomness that can be repeated: a failed test prints its seed, and CLODEI_TEST_SEED plays it again.

/** The seed of this run. */
export function testSeed(): number {
  const given = process.env["CLODEI_TEST_SEED"];
  return given === undefined ? Math.floor(Math.random() * 0x1_0000_0000) : Number(given) >>> 0;
}

/** How much of something a test makes: more where a variable of the environment says so. */
export function amount(variable: string, usual: number): number {
  const given = Number(process.env[variable] ?? usual);
  if (!Number.isSafeInteger(given) || given < 1) throw new Error(`${variable} must be a number above 0`);
  return given;
}

/** Numbers from 0 to below 1 from a 32-bit seed (the mulberry32 generator). */
export function randomFrom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 0x1_0000_0000;
  };
}
