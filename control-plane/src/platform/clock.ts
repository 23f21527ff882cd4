// Time is an argument: what decides by time takes a Clock, so that a test gives it the time it wants.

/** Says what time it is. */
export type Clock = () => Date;

/** The machine's clock. */
export const systemClock: Clock = () => new Date();
