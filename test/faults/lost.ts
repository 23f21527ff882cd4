// What a killed engine may cost a customer: a start of which nobody can tell whether it began the program, and an end
// of which nobody can tell how it was. Both fail as errors of the node, and never run anything again by themselves.

/** What the instance's message says then: its program ran once or not at all. */
export const lostStart = /engine was killed while it started the container, and nobody knows whether the program ran/;

/** The same for an end: its program ran once. */
export const lostEnd = /engine was killed when the container ended, and nobody knows how it ended/;
