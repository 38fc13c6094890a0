# shellcheck shell=bash
# A browser without a screen, in which a test opens the report of a study. To be sourced by install.sh.

# want_browser: sees to it that there is one; without, that test says why it is skipped.
want_browser() {
    local name
    for name in chromium-headless-shell chromium chromium-browser google-chrome chrome; do
        if type -P "$name" >/dev/null; then return; fi
    done
    debian_packages "a browser" chromium-headless-shell ||
        echo "install: no Chromium on the path: the test that opens a report in a browser will be skipped"
}
