"""Drives chromium, or the browser that $CHROMIUM names, without a window, through two pipes with the DevTools protocol."""
import json
import os
import select
import subprocess

OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
           "--disable-sync", "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
PATIENCE = 60  # seconds within which the browser must answer


class Browser(object):
    """One chromium with one tab, whose profile is in a folder. Call open() with a page, then examine it."""

    def __init__(self, folder):
        read_there, self.write = os.pipe()
        self.read, write_there = os.pipe()
        # chromium reads commands from 3 and writes answers to 4, each ended by a NUL
        self.process = subprocess.Popen(
            ["bash", "-c", 'exec "$@" 3<&%d 4>&%d' % (read_there, write_there), "bash", os.environ.get("CHROMIUM", "chromium"),
             "--user-data-dir=%s" % folder] + OPTIONS + ["about:blank"],
            pass_fds=(read_there, write_there), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read_there)
        os.close(write_there)
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

    def receive(self):
        """Returns the browser's next message."""
        while b"\0" not in self.rest:
            assert select.select([self.read], [], [], PATIENCE)[0], "chromium does not answer"
            data = os.read(self.read, 1 << 20)
            assert data, "chromium ended; does it start by hand?"
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
                assert "error" not in answer, (method, answer)
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

    def screen(self, width=1200, scheme="light", media=""):
        """Sets the window's width in pixels, whether the user prefers light or dark, and the medium, such as print."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])

    def problems(self):
        """Returns the page's errors, and the errors and warnings that the browser logs about it."""
        return self.happened("Runtime.exceptionThrown") + [
            log for log in self.happened("Log.entryAdded") if log["entry"]["level"] in ("error", "warning")]

    def requests(self):
        """Returns the requested addresses, without data: addresses."""
        return [request["request"]["url"] for request in self.happened("Network.requestWillBeSent")
                if not request["request"]["url"].startswith("data:")]
