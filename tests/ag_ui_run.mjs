// Run an agent with AG-UI's own client, and print the events that it accepted, one a line.
//
// Usage:  node ag_ui_run.mjs FOLDER URL THREAD RUN [TASK]     FOLDER: where `npm install @ag-ui/client` was run
//
// TASK is JSON, sent as forwardedProps. Exit code 1 if the client refuses what the server sends.

import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const [folder, url, threadId, runId, task] = process.argv.slice(2);
const require = createRequire(join(resolve(folder), "package.json"));
const { HttpAgent } = require("@ag-ui/client");

const agent = new HttpAgent({ url, threadId });
const onEvent = ({ event }) => console.log(JSON.stringify(event));
await agent.runAgent({ runId, ...(task && { forwardedProps: JSON.parse(task) }) }, { onEvent });
