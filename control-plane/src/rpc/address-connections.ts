// Limits how many connections one address has open, so that it cannot take all that a listener has. In memory and
// for one listener of one replica.
import type { Socket } from "node:net";
import { limitedAddressOf } from "./rate-limit.ts";

/** The open connections of a listener, by address. */
export class AddressConnections {
  readonly #max: number;
  readonly #open = new Map<string, number>();

  constructor(max: number) {
    this.#max = max;
  }

  /** Counts a connection until it closes. @returns false where its address has as many as it may: it was cut. */
  admit(socket: Socket): boolean {
    const address = limitedAddressOf(socket.remoteAddress ?? "");
    const open = this.#open.get(address) ?? 0;
    if (open >= this.#max) {
      socket.destroy();
      return false;
    }
    this.#open.set(address, open + 1);
    socket.once("close", () => {
      const left = (this.#open.get(address) ?? 1) - 1;
      if (left === 0) this.#open.delete(address);
      else this.#open.set(address, left);
    });
    return true;
  }
}
