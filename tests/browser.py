"""Drives chromium, or the browser that $CHROMIUM names, without a window, through two pipes with the DevTools protocol."""
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
           "--disable-sync", "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
PATIENCE = 60  # the browser must answer within this many seconds


class Browser(object):
    """One chromium with one tab. Call open() with a page, then examine it."""

    def __init__(self):
        self.folder = tempfile.mkdtemp()
        (read_there, write_here), (read_here, write_there) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_there, write_there)]  # the ends must not be 3 or 4
        os.close(read_there)
        os.close(write_there)
        # chromium reads commands from 3 and writes answers to 4, each ended by a NUL
        self.process = subprocess.Popen(
            ["bash", "-c", 'exec "$@" 3<&%d 4>&%d' % tuple(high), "bash", os.environ.get("CHROMIUM", "chromium"),
             "--user-data-dir=" + self.folder] + OPTIONS + ["about:blank"],
            pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in high:
            os.close(end)
        self.write, self.read = write_here, read_here
        self.rest, self.number, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(domain + ".enable")

    def close(self):
        self.process.terminate()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)
        shutil.rmtree(self.folder, ignore_errors=True)

    def receive(self):
        """Returns the browser's next message. Raises RuntimeError if there is none."""
        end = time.time() + PATIENCE
        while b"\0" not in self.rest:
            if not select.select([self.read], [], [], max(0, end - time.time()))[0]:
                raise RuntimeError("chromium does not answer")
            data = os.read(self.read, 1 << 20)
            if not data:
                raise RuntimeError("chromium ended; does it start by hand?")
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message.decode())

    def call(self, method, **parameters):
        """Calls a method of the protocol and returns its result. Adds events that arrive meanwhile to self.events."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError("%s: %s" % (method, answer["error"]))
                return answer["result"]
            self.events.append(answer)

    def happened(self, method):
        """Returns the parameters of all events of this kind since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def open(self, path):
        """Opens a file and waits until it is loaded."""
        del self.events[:]
        assert "errorText" not in self.call("Page.navigate", url="file://" + os.path.abspath(str(path)))
        while not self.happened("Page.loadEventFired"):
            self.events.append(self.receive())

    def run(self, script):
        """Returns the value of a JavaScript expression. Waits for it if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, selector):
        """Clicks into the middle of an element with the mouse, as a person would."""
        x, y = self.run("(e => { e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
                        "return [r.x + r.width / 2, r.y + r.height / 2]; })(document.querySelector(%s))"
                        % json.dumps(selector))
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, key, text=""):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text if kind == "keyDown" else "",
                      windowsVirtualKeyCode={"Enter": 13, "Tab": 9}[key])

    def screen(self, width=1200, height=900, scheme="light"):
        """Sets the window's size in pixels, and whether the user prefers light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        with open(str(path), "wb") as f:
            f.write(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=False)["data"]))

    def problems(self):
        """Returns the errors and warnings in the browser's console."""
        bad = ("error", "warning")
        return (self.happened("Runtime.exceptionThrown")
                + [call for call in self.happened("Runtime.consoleAPICalled") if call["type"] in bad]
                + [log for log in self.happened("Log.entryAdded") if log["entry"]["level"] in bad])

    def requests(self):
        """Returns the requested addresses, without data: addresses."""
        return [request["request"]["url"] for request in self.happened("Network.requestWillBeSent")
                if not request["request"]["url"].startswith("data:")]
