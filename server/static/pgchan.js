// pgchan's browser client: read a channel as it grows, through any number of connections, each message once, in order.
//
//   import { connect } from "/pgchan.js"
//   const channel = connect("/channels/chat/42", { after: 0 })
//   for await (const message of channel) …
//
// How it goes on: each message carries a cursor. When the connection ends, for whatever reason, the next one asks for
// what lies behind the last cursor. Only `event: end` ends a channel; a body that just stops means "to be continued".
// Server-sent events are read with fetch, not with EventSource, which can send no token and never notices silence.

const HEARTBEAT_MS = 15_000 // the server's promise: no longer silence than this
const HEARTBEATS_MISSED_MAX = 3
const RETRY_MS = 1_000 // first back-off, until the server names its own in `retry:`
const RETRY_MS_MAX = 30_000
const FIRST_BYTE_MS = 5_000 // a proxy that buffers delivers nothing for longer
const SILENT_CONNECTIONS_MAX = 3 // then long polling
const POLL_SECONDS = 25
const POLL_LIMIT = 1_000
const EVENT_CHARACTERS_MAX = 8 * 1024 * 1024 // a message body has at most 1 MiB

/** What the server refused for good: `status`, and `code` and `detail` of its problem document. */
export class ChannelError extends Error {
  constructor(status, problem) {
    super(problem.title ?? `the server answered ${status}`)
    this.name = "ChannelError"
    this.status = status
    this.code = problem.code
    this.detail = problem.detail
    this.problem = problem
  }
}

/**
 * Open a channel by its address. Nothing is sent before it is iterated, published to or signalled.
 *
 * after: 0 for all that is kept, a position, a cursor, or "now". token: a function that returns a bearer token; it is
 * asked on each connect, and once more when the server does not take one. view: "final" or "raw" (void output too).
 * onstate: told "connecting", "live", "waiting", "ended", "closed" as it changes. One iteration per channel object.
 */
export function connect(url, options = {}) {
  return new Channel(url, options)
}

class Channel {
  #token
  #onstate
  #next // where the next connection starts: a position, a cursor or "now"
  #position = 0 // the last one seen; what lies at or before it is not given out again
  #retry = RETRY_MS
  #silent = 0 // connections in a row that delivered no byte in time
  #connection = null // AbortController of the request under way
  #skipWait = null
  #pause = 0
  #heardAt = 0
  #iterated = false

  constructor(url, { after = 0, token = null, view = null, onstate = null }) {
    this.url = new URL(url, globalThis.location?.href)
    this.view = view
    this.state = "idle"
    this.#token = token
    this.#onstate = onstate
    this.#next = after
    const known = /^(\d{16})_|^(\d+)$/.exec(String(after))
    if (known) this.#position = Number(known[1] ?? known[2])
  }

  /** Where this reader stands: pass it as `after` to go on from here later. */
  get cursor() {
    return this.#next
  }

  get position() {
    return this.#position
  }

  async *[Symbol.asyncIterator]() {
    if (this.#iterated) throw new Error("this channel object is being read already; connect() once more")
    this.#iterated = true
    const wake = () => this.#wake()
    globalThis.addEventListener?.("online", wake)
    globalThis.document?.addEventListener("visibilitychange", wake)
    try {
      yield* this.#messages()
    } finally {
      globalThis.removeEventListener?.("online", wake)
      globalThis.document?.removeEventListener("visibilitychange", wake)
      this.close()
    }
  }

  /** Append a message to the channel; its JSON. With `key` a repeat stores nothing and returns the first. */
  publish(body, { key = null } = {}) {
    return this.#post(this.url, body, key)
  }

  /** Send a signal to the run whose channel this is. */
  signal(body, { key = null } = {}) {
    const url = new URL(this.url)
    url.pathname = url.pathname.replace(/\/channels\/(.+)$/, "/runs/$1/signals")
    return this.#post(url, body, key)
  }

  /** Stop reading. The iteration ends; nothing happens to the channel. */
  close() {
    if (this.state !== "ended") this.#become("closed")
    this.#connection?.abort()
    this.#skipWait?.()
  }

  /** Cut the connection and resume from the cursor, after `pause` milliseconds. */
  reconnect(pause = 0) {
    this.#pause = pause
    this.#connection?.abort("reconnect")
    this.#skipWait?.()
  }

  async *#messages() {
    let failures = 0
    let refused = false // the last answer was 401
    while (this.state !== "closed") {
      this.#become("connecting")
      const connection = (this.#connection = new AbortController())
      const startedAt = performance.now()
      let delay = null
      try {
        const poll = this.#silent >= SILENT_CONNECTIONS_MAX
        const response = await this.#open(poll, connection)
        if (response.status === 204) return this.#become("ended")
        if (!response.ok) {
          delay = await this.#judge(response, refused)
          refused = response.status === 401
        } else {
          refused = false
          this.#become("live")
          for await (const message of poll ? this.#page(response) : this.#events(response, connection)) {
            failures = 0
            if (message === END) return this.#become("ended")
            yield message
            if (this.state === "closed") return
          }
          if (poll) continue
        }
      } catch (error) {
        if (this.state === "closed") return
        // The network, or an abort of our own, means "not finished": go on. Everything else is for the caller.
        if (!(error instanceof TypeError || error instanceof DOMException || error === "reconnect")) throw error
      } finally {
        connection.abort() // also when the consumer leaves the loop
      }
      if (this.state === "closed") return
      if (performance.now() - startedAt > RETRY_MS_MAX) failures = 0
      // Full jitter: readers that lost the same server do not come back at the same moment.
      delay ??= Math.random() * Math.min(RETRY_MS_MAX, this.#retry * 2 ** failures++)
      if (connection.signal.reason === "reconnect") delay = this.#pause
      await this.#wait(delay)
    }
  }

  async #open(poll, connection) {
    const url = new URL(this.url)
    url.searchParams.set("after", this.#next)
    if (this.view) url.searchParams.set("view", this.view)
    const headers = { Accept: poll ? "application/json" : "text/event-stream" }
    if (poll) {
      url.searchParams.set("wait", POLL_SECONDS)
      url.searchParams.set("limit", POLL_LIMIT)
    } else if (String(this.#next).includes("_")) {
      headers["Last-Event-ID"] = this.#next
    }
    await this.#authorize(headers)
    const timer = setTimeout(() => {
      this.#silent++
      connection.abort()
    }, HEARTBEATS_MISSED_MAX * HEARTBEAT_MS)
    try {
      return await fetch(url, { headers, cache: "no-store", signal: connection.signal })
    } finally {
      clearTimeout(timer)
    }
  }

  /** What a refusal means: milliseconds to wait, null for the usual back-off; throws where trying again is no use. */
  async #judge(response, refused) {
    const { status } = response
    const problem = await response.json().catch(() => ({}))
    if (status === 401 && this.#token && !refused) return 0
    if (status < 500 && status !== 408 && status !== 425 && status !== 429) throw new ChannelError(status, problem)
    const seconds = Number(response.headers.get("Retry-After"))
    return seconds > 0 ? seconds * 1000 * (1 + Math.random() / 4) : null
  }

  async *#events(response, connection) {
    let bytes = 0
    const silence = setInterval(() => {
      const limit = bytes ? HEARTBEATS_MISSED_MAX * HEARTBEAT_MS : FIRST_BYTE_MS
      if (this.#reading && performance.now() - this.#heardAt > limit) connection.abort()
    }, 1_000)
    try {
      for await (const event of parse(this.#chunks(response, (length) => (bytes += length)))) {
        if (event.retry !== null) this.#retry = event.retry
        if (event.id && !event.data) this.#next = event.id // where this reader stands, before any message
        if (!event.data) continue
        if (event.type === "end") return void (yield END)
        if (event.type === "auth_expired") return
        const data = JSON.parse(event.data)
        if (event.type === "reset") {
          this.#next = data.cursor
          this.#position = Number(data.cursor.slice(0, 16))
          yield { kind: "reset", body: data, cursor: data.cursor, position: this.#position }
        } else if (this.#take(data)) {
          yield data
        }
      }
    } finally {
      clearInterval(silence)
      this.#silent = bytes ? 0 : this.#silent + 1
    }
  }

  #reading = false // a read is under way: silence while the consumer is busy is not the server's

  async *#chunks(response, count) {
    const reader = response.body.getReader()
    try {
      while (true) {
        this.#reading = true
        this.#heardAt = performance.now()
        const { done, value } = await reader.read()
        this.#reading = false
        if (done) return
        count(value.length)
        yield value
      }
    } finally {
      this.#reading = false
      reader.cancel().catch(() => {})
    }
  }

  /** One answer of a long poll. */
  async *#page(response) {
    const page = await response.json()
    for (const message of page.messages) if (this.#take(message)) yield message
    this.#next = page.cursor
    if (page.closed && Number(page.cursor.slice(0, 16)) >= page.head) yield END
  }

  /** Note a message as seen; false if it had been. */
  #take(message) {
    if (message.position <= this.#position) return false
    this.#position = message.position
    this.#next = message.cursor
    return true
  }

  /** Online again, or looked at again: do not sit out a back-off, and do not trust a connection that went quiet. */
  #wake() {
    if (globalThis.document?.visibilityState === "hidden") return
    if (this.state === "waiting" && !this.#pause) this.#skipWait?.()
    else if (this.state === "live" && this.#reading && performance.now() - this.#heardAt > HEARTBEAT_MS) this.reconnect()
  }

  async #wait(ms) {
    if (!(ms > 0)) return void (this.#pause = 0)
    this.#become("waiting")
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, ms)
      this.#skipWait = () => {
        clearTimeout(timer)
        resolve()
      }
    })
    this.#skipWait = null
    this.#pause = 0
  }

  async #post(url, body, key) {
    for (const last of [false, true]) {
      const headers = { "Content-Type": "application/json" }
      if (key !== null) headers["Idempotency-Key"] = key
      await this.#authorize(headers)
      const response = await fetch(url, { method: "POST", headers, body: JSON.stringify({ body }) })
      if (response.ok) return response.json()
      if (response.status === 401 && this.#token && !last) continue
      throw new ChannelError(response.status, await response.json().catch(() => ({})))
    }
  }

  async #authorize(headers) {
    const token = await this.#token?.()
    if (token) headers.Authorization = `Bearer ${token}`
  }

  #become(state) {
    if (this.state === state || this.state === "closed" || this.state === "ended") return
    this.state = state
    this.#onstate?.(state)
  }
}

const END = Symbol("end")

/** Events of a text/event-stream body: {type, data, id, retry}. `chunks` may be cut anywhere, also inside a character. */
export async function* parse(chunks) {
  const decoder = new TextDecoder() // remembers half a character until the next chunk
  let text = ""
  let event = blank()
  for await (const chunk of chunks) {
    text += decoder.decode(chunk, { stream: true })
    let start = 0
    const ends = /\r\n|\n|\r(?!$)/g // a CR that ends the chunk may be half of a CR LF: wait
    for (let end; (end = ends.exec(text)); start = ends.lastIndex) {
      const line = text.slice(start, end.index)
      if (line) {
        field(event, line)
      } else {
        if (event.data !== null || event.id !== null || event.retry !== null) yield event
        event = blank()
      }
    }
    text = text.slice(start)
    if (text.length + (event.data?.length ?? 0) > EVENT_CHARACTERS_MAX) throw new Error("an event is too long")
  }
}

function blank() {
  return { type: "message", data: null, id: null, retry: null }
}

function field(event, line) {
  const colon = line.indexOf(":")
  if (colon === 0) return // a comment: the heartbeat
  const name = colon < 0 ? line : line.slice(0, colon)
  const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1))
  if (name === "data") event.data = event.data === null ? value : `${event.data}\n${value}`
  else if (name === "event") event.type = value
  else if (name === "id") event.id = value
  else if (name === "retry" && /^\d+$/.test(value)) event.retry = Number(value)
}

/**
 * Take the next message into `messages`, the list of those that stand, and return those that fall because of it.
 *
 * When a step is tried again and starts over, pgchan writes one control message {"type": "reset", step, attempt, from}:
 * what earlier attempts of that step published from that position on is void. Without a step, as in a channel that was
 * compacted, all that was there from that position on falls; the text follows anew. When history was lost (`kind`
 * "reset"), everything falls. A page that gets an empty list back need only add; else it redraws what it shows of the fallen.
 */
export function fold(messages, message) {
  let fallen = []
  if (message.kind === "reset") {
    if (message.body.reason === "history_lost") fallen = messages.splice(0)
  } else if (message.kind === "control" && message.body?.type === "reset") {
    const { step, attempt, from } = message.body
    const isOfStep = (m) => m.kind === "message" && m.step === step && m.attempt < attempt
    const isVoid = (m) => m.position >= from && (step == null || isOfStep(m))
    fallen = messages.filter(isVoid)
    if (fallen.length) messages.splice(0, messages.length, ...messages.filter((m) => !isVoid(m)))
  }
  messages.push(message)
  return fallen
}
