// The search runs in a Worker, which browsers do not start for pages that are read from a disk (file://).
// There a hidden frame takes its place: it runs the same script and passes the same messages.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.answer = data => this.dispatchEvent(new MessageEvent("message", { data }))
      frame.srcdoc =
        "<script>" +
        "window.postMessage = data => frameElement.answer(data);" +
        "window.importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise(done => {" +
        "const script = document.createElement('script'); script.src = url; script.onload = done;" +
        "document.head.appendChild(script) })), Promise.resolve())" +
        "</" + "script><script src=\"" + url + "\"></" + "script>"
      this.ready = new Promise(done => { frame.onload = done })
      this.frame = frame
      document.body.appendChild(frame)
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
