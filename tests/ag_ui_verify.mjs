// Check sequences of AG-UI events with the client's own rules.
//
// Usage:  node ag_ui_verify.mjs FOLDER < events.jsonl     FOLDER: where `npm install @ag-ui/client` was run
//
// Standard input: one event a line; an empty line ends a sequence, and the next line begins another one.
// Exit code 0 if the client accepts them all and warns of nothing, else 1, and the reason on standard error.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const require = createRequire(join(resolve(process.argv[2]), "package.json"));
const { enforceEvents, verifyEvents } = require("@ag-ui/client");
const { from } = require("rxjs");

const sequences = readFileSync(0, "utf8")
  .split(/\n\n/)
  .map((sequence) => sequence.split("\n").filter(Boolean).map((line) => JSON.parse(line)));

sequences.forEach((events, number) => {
  let accepted = 0;
  const fail = (reason) => {
    console.error(`sequence ${number}, event ${accepted}: ${reason}\n${JSON.stringify(events[accepted])}`);
    process.exit(1);
  };
  console.warn = fail; // the client drops what the protocol does not know, with a warning
  from(events)
    .pipe(enforceEvents(), verifyEvents()) // the schema, then the order: as the client's agents do
    .subscribe({ next: () => accepted++, error: (error) => fail(error.message) });
  if (accepted !== events.length) fail("only a part was accepted");
});
console.log(`${sequences.length} sequences`);
