// Limits how much one address has open, so that it cannot take all that a listener has. In memory and for one listener
// of one replica.
import { limitedAddressOf } from "./rate-limit.ts";

/** What each address has open of one kind: connections, or requests that come through a proxy. */
export class AddressSlots {
  readonly #max: number;
  readonly #open = new Map<string, number>();

  constructor(max: number) {
    this.#max = max;
  }

  /** Takes a slot of the address. @returns what gives it back, once; undefined where the address has all it may have. */
  take(address: string): (() => void) | undefined {
    const key = limitedAddressOf(address);
    const open = this.#open.get(key) ?? 0;
    if (open >= this.#max) return undefined;
    this.#open.set(key, open + 1);
    return () => {
      const left = (this.#open.get(key) ?? 1) - 1;
      if (left === 0) this.#open.delete(key);
      else this.#open.set(key, left);
    };
  }
}
