// The pictures' cursors follow the recording, and a click on one plays its window. Listens on the document, because
// panels come and go.
(() => {
  let until = null; // where a window that is played ends, in seconds

  const player = () => document.querySelector("audio.sailer-player");
  const share = (timeline, seconds) => {
    const { start, end } = timeline.dataset;
    return Math.min(1, Math.max(0, (seconds - start) / (end - start)));
  };

  function follow() {
    const audio = player();
    if (!audio) return;
    if (until !== null && audio.currentTime >= until) {
      audio.pause();
      until = null;
    }
    document.querySelectorAll("#sailer-results .sailer-timeline").forEach((timeline) => {
      timeline.querySelector(".sailer-cursor").style.left = `${100 * share(timeline, audio.currentTime)}%`;
    });
    if (!audio.paused) requestAnimationFrame(follow);
  }

  function mark(windows, place) {
    document.querySelectorAll("#sailer-results .sailer-timeline").forEach((timeline) => {
      const [start, end] = windows[place];
      const played = timeline.querySelector(".sailer-played");
      played.style.left = `${100 * share(timeline, start)}%`;
      played.style.width = `${100 * (share(timeline, end) - share(timeline, start))}%`;
    });
  }

  async function play(timeline, place) {
    const audio = player();
    const windows = JSON.parse(timeline.dataset.windows);
    if (!audio || !windows[place]) return;
    mark(windows, place);
    audio.currentTime = windows[place][0];
    try {
      await audio.play();
    } catch (error) {
      return; // the browser cannot play this file, or was asked for another
    }
    until = windows[place][1]; // only now: the event of an earlier place may still come
  }

  document.addEventListener("click", (event) => {
    const results = event.target.closest("#sailer-results");
    if (!results) return;
    const tracks = event.target.closest(".sailer-tracks");
    if (tracks) {
      const timeline = tracks.closest(".sailer-timeline");
      const box = tracks.getBoundingClientRect();
      const [start, end] = [Number(timeline.dataset.start), Number(timeline.dataset.end)];
      const seconds = start + ((event.clientX - box.left) / box.width) * (end - start);
      const away = JSON.parse(timeline.dataset.windows).map(([left, right]) => Math.abs((left + right) / 2 - seconds));
      play(timeline, away.indexOf(Math.min(...away)));
    }
    const button = event.target.closest(".sailer-play");
    if (button) {
      play(button.closest(".sailer-panel").querySelector(".sailer-timeline"), Number(button.dataset.window));
    }
  });

  // Events of audio do not bubble, so they are caught on their way down.
  for (const name of ["play", "seeked", "timeupdate", "pause"]) {
    document.addEventListener(name, (event) => event.target.matches?.("audio.sailer-player") && follow(), true);
  }
  document.addEventListener("seeking", (event) => {
    if (event.target.matches?.("audio.sailer-player") && !event.target.paused) until = null;
  }, true);
})();
