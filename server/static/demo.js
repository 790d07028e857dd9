// The demo's page: everything it shows comes from the run's channel, so a second tab or a reload shows the same.
// Only what concerns this page's own connection is local.

import { connect, fold } from "/pgchan.js"

const WORKFLOW = "research"
const DROP_MS = 1_500 // how long "drop my connection" stays away, to be seen

const element = (id) => document.getElementById(id)
const run = new URLSearchParams(location.search).get("run")
const path = run?.split("/").map(encodeURIComponent).join("/")

element("start").addEventListener("submit", (event) => {
  event.preventDefault()
  start(element("topic").value.trim())
})
for (const button of document.querySelectorAll("[data-topic]")) {
  button.addEventListener("click", () => start(button.dataset.topic))
}

async function start(topic) {
  if (!topic) return
  const name = topic.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 40) || "report"
  const id = `${name}-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`
  const made = await ask("/runs", { workflow: WORKFLOW, args: [topic], id })
  if (made) location.assign(`/demo?run=${encodeURIComponent(id)}`)
}

async function introduce() {
  element("intro").hidden = false
  const runs = (await get(`/runs?workflow=${WORKFLOW}&limit=8`))?.runs ?? []
  for (const { id, state, created_at } of runs) {
    const link = make("a", id)
    link.href = `/demo?run=${encodeURIComponent(id)}`
    const when = new Date(created_at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })
    element("earlier").querySelector("ul").append(make("li", link, make("small", `${state} · ${when}`)))
  }
  element("earlier").hidden = !runs.length
}

// ---------------------------------------------------------------------------------------------- one run

let channel
let status = {}
let workers = []
const messages = [] // what stands: without void output
const steps = new Map() // name → its <li>
const recorded = new Set() // names of steps whose result is in the journal
const interrupted = new Set() // names of steps that a signal ended: they consumed it, and have no result
const attempts = new Map() // name → the highest attempt seen
let journalCursor = 0
let asking = null // the request for status and journal that is under way
let askAgain = false
let later = 0
let writing = null // { section, text }: the section that text goes to
let killed = null // the message that told of a kill, until the run goes on
let dropped = null // this page's own connection was cut: when, and at which position

if (run) {
  element("run").hidden = false
  element("address").textContent = element("address").href = location.href
  element("kill").addEventListener("click", kill)
  element("drop").addEventListener("click", drop)
  element("redirect").addEventListener("submit", redirect)
  document.title = `${run} · pgchan demo`
  follow().catch((error) => complain(error))
  refresh().then(() => status.state || complain(new Error(`There is no run ${run}.`)))
} else {
  introduce()
}

async function follow() {
  channel = connect(`/channels/${path}`, { after: 0, onstate: showConnection })
  for await (const message of channel) {
    const fallen = fold(messages, message)
    if (fallen.length) redraw()
    else showReport(message)
    showLog(message)
    element("position").textContent = message.position
    if (isNews(message)) refresh()
    if (dropped && channel.state === "live") reportResumed(message)
  }
}

/** Something that the run's status or journal will show: a step or an attempt not seen before, or a control message. */
function isNews(message) {
  if (message.kind !== "message") return true
  if (message.body.type === "killed") return true
  if (!message.step) return false
  const isNew = message.attempt > (attempts.get(message.step) ?? 0)
  if (isNew) attempts.set(message.step, message.attempt)
  return isNew
}

// The run's status and what it has recorded. Asked when the channel brings news, and once more when it is quiet: a
// step that says nothing at its end is recorded a moment after its last message.
async function refresh(isNews = true) {
  clearTimeout(later)
  if (asking) return void (askAgain = true)
  asking = (async () => {
    const [now, journal, alive] = await Promise.all([
      get(`/runs/${path}`), get(`/runs/${path}/journal?after=${journalCursor}&limit=1000`), get("/demo/workers"),
    ])
    if (now) status = now
    if (alive) workers = alive.workers
    for (const message of journal?.messages ?? []) if (message.kind === "message") recorded.add(message.key)
    if (journal?.cursor) journalCursor = journal.cursor
    showStatus()
  })()
  await asking
  asking = null
  if (askAgain) {
    askAgain = false
    refresh()
  } else if (isNews && !status.ended_at) {
    later = setTimeout(refresh, 400, false)
  }
}

// ---------------------------------------------------------------------------------------------- the report and the steps

function redraw() {
  element("report").replaceChildren()
  element("steps").replaceChildren()
  steps.clear()
  writing = null
  for (const message of messages) showReport(message)
}

function showReport(message) {
  if (message.kind !== "message") return
  const { body, step } = message
  if (step) showStep(message)
  const report = element("report")
  if (body.type === "plan") {
    report.append(make("h1", body.topic))
    if (!body.sections.length) report.append(make("p", "The standard library says nothing about it. Try another topic."))
  } else if (body.type === "section") {
    const section = make("section", make("h3", body.title), make("p"))
    report.append(section)
    settle()
    section.classList.add("writing")
    writing = { section, text: "", step }
  } else if (body.type === "text" && writing) {
    writing.text += body.text
    showText(writing)
  } else if (body.type === "decision") {
    settle()
    report.append(make("p", body.text))
    report.lastChild.className = "turn"
  }
}

/** Paragraphs and quotes; only the last block changes while text arrives. */
function showText({ section, text }) {
  const isAtEnd = innerHeight + scrollY > document.documentElement.scrollHeight - 80
  const blocks = text.split("\n\n")
  while (section.children.length <= blocks.length) section.append(make("p"))
  for (let n = Math.max(0, blocks.length - 2); n < blocks.length; n++) {
    const isQuote = blocks[n].startsWith(">")
    let block = section.children[n + 1]
    if (isQuote && block.tagName === "P") {
      block.replaceWith(make("blockquote"))
      block = section.children[n + 1]
    }
    block.textContent = isQuote ? blocks[n].replace(/^> ?/gm, "") : blocks[n]
  }
  while (section.children.length > blocks.length + 1) section.lastChild.remove()
  if (isAtEnd) scrollTo(0, document.documentElement.scrollHeight)
}

function settle() {
  writing?.section.classList.remove("writing")
  writing = null
}

function showStep({ step, attempt, body }) {
  let item = steps.get(step)
  if (!item) {
    item = make("li", make("span"), make("small"))
    item.dataset.step = step
    item.dataset.state = "running"
    item.count = 0
    steps.set(step, item)
    element("steps").append(item)
  }
  item.dataset.attempt = attempt
  if (body.type === "step") item.firstChild.textContent = body.title
  if (body.type === "section") item.firstChild.textContent = `Write about ${body.title}`
  if (body.type === "reading") item.note = `read ${++item.count} modules, ${body.module} last`
  if (body.type === "text") item.note = `${(item.count += body.text.trim().split(/\s+/).length)} words`
  if (body.type === "plan") item.note = `${body.sections.length} sections`
  showStepState(item)
}

function showStepState(item) {
  if (recorded.has(item.dataset.step)) item.dataset.state = "recorded"
  else if (interrupted.has(item.dataset.step)) item.dataset.state = "interrupted"
  const { step, state } = item.dataset
  const parts = [step, state === "running" ? "under way" : state]
  if (item.dataset.attempt > 1) parts.push(`attempt ${item.dataset.attempt}`)
  if (item.note) parts.push(item.note)
  item.lastChild.textContent = parts.join(" · ")
}

// ---------------------------------------------------------------------------------------------- status and log

function showStatus() {
  const pid = workers.find((worker) => worker.name === status.worker)?.pid
  document.body.dataset.state = status.state ?? "unknown"
  element("state").textContent = status.state ?? "unknown"
  element("worker").textContent = status.worker ? `${status.worker}${pid ? ` · pid ${pid}` : ""}` : "none"
  element("worker").dataset.name = status.worker ?? ""
  element("attempt").textContent = status.attempt === 1 ? "once" : `${status.attempt ?? 0} times`
  const isOver = Boolean(status.ended_at)
  element("kill").disabled = isOver || status.state !== "running" || !pid
  element("redirect").querySelector("button").disabled = isOver
  for (const item of steps.values()) showStepState(item)
}

function showConnection(state) {
  const words = { connecting: "connecting …", live: "connected", waiting: "cut off", ended: "all received", closed: "closed" }
  document.body.dataset.connection = state
  element("connection").textContent = words[state]
  element("drop").disabled = state !== "live"
}

function showLog(message) {
  const { body } = message
  if (killed) showTakeover(message)
  if (message.kind === "signal") {
    log("signal", `Signal ${message.position}: turn to “${body?.text ?? JSON.stringify(body)}”`, message.at)
  } else if (message.kind === "reset") {
    log("failed", `The server no longer has what this page has seen (${body.reason})`)
  } else if (message.kind === "control") {
    if (body.type === "reset" && body.step) log("void", `${body.step} starts over: what it said before is void`, message.at)
    if (body.type === "consumed") {
      interrupted.add(body.step)
      log("signal", `Signal ${body.signal} was consumed by ${body.step}`, message.at)
    }
    if (body.type === "ended") {
      settle() // here and not where the status is shown, which may know of the end before the last words have come
      log("ended", `The run ${body.state === "cancelled" ? "was cancelled" : body.state} after ${message.position} messages`, message.at)
      if (body.missed?.length) log("signal", `It ended before signal ${body.missed.join(", ")} was read`, message.at)
    }
  } else if (body.type === "killed") {
    killed = message
    log("killed", `kill -9 ${body.pid}: ${body.worker} is gone`, message.at)
  } else if (body.type === "decision") {
    log("decision", body.text, message.at)
  }
}

/** The first message of an attempt that the killed worker cannot have written ends the wait. */
function showTakeover(message) {
  const step = message.step ?? message.body?.step
  const attempt = message.attempt ?? message.body?.attempt
  if (!step || !(attempt > (attempts.get(step) ?? 0))) return
  const seconds = (new Date(message.at) - new Date(killed.at)) / 1000
  const how = message.kind === "control" ? "is tried again" : attempt > 1 ? "goes on" : "comes next"
  log("takeover", `Taken over after ${seconds.toFixed(2)} s: ${step} ${how}, attempt ${attempt}`, message.at)
  killed = null
}

function log(kind, text, at = new Date()) {
  const time = make("time", new Date(at).toLocaleTimeString([], { hour12: false }))
  const item = make("li", time, make("span", text))
  item.dataset.kind = kind
  element("log").append(item)
}

// ---------------------------------------------------------------------------------------------- buttons

async function kill() {
  element("kill").disabled = true
  if (!(await ask("/demo/kill", { run }))) refresh()
}

function drop() {
  dropped = { at: performance.now(), position: channel.position }
  log("dropped", `Connection dropped after message ${channel.position}`)
  channel.reconnect(DROP_MS)
}

function reportResumed(message) {
  const seconds = ((performance.now() - dropped.at) / 1000).toFixed(1)
  log("resumed", `Connected again after ${seconds} s, going on with message ${message.position}`)
  dropped = null
}

async function redirect(event) {
  event.preventDefault()
  const text = element("wish").value.trim()
  if (!text) return
  try {
    await channel.signal({ type: "redirect", text })
    element("wish").value = ""
  } catch (error) {
    complain(error)
  }
}

// ---------------------------------------------------------------------------------------------- small things

async function get(url) {
  try {
    const response = await fetch(url, { headers: { Accept: "application/json" } })
    return response.ok ? await response.json() : null
  } catch {
    return null // the next piece of news asks again
  }
}

async function ask(url, body) {
  try {
    const headers = { "Content-Type": "application/json" }
    const response = await fetch(url, { method: "POST", headers, body: JSON.stringify(body) })
    const answer = await response.json()
    if (!response.ok) throw new Error(answer.detail ?? answer.title ?? `the server answered ${response.status}`)
    return answer
  } catch (error) {
    complain(error)
    return null
  }
}

function complain(error) {
  element("error").hidden = false
  element("error").textContent = error.message
}

function make(tag, ...children) {
  const made = document.createElement(tag)
  made.append(...children)
  return made
}
