// The login page after a wrong token: the server sends the browser back with ?failed=1.

import { byId } from "./common.js";

byId("failed").hidden = !new URLSearchParams(location.search).has("failed");
if (!byId("failed").hidden) byId("token").setAttribute("aria-invalid", "true");
