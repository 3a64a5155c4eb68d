#!/bin/sh
# What the tests need beyond pip: a real MQTT broker, a browser for the report page, and strace
# for the power-cut suite (tests/torture/f7_power.py).
# Installs them with apt when it can; else says how. Never skips in silence.
missing=""
command -v mosquitto >/dev/null 2>&1 || [ -x /usr/sbin/mosquitto ] || missing="$missing mosquitto"
command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 \
  || command -v google-chrome >/dev/null 2>&1 || missing="$missing chromium"
command -v strace >/dev/null 2>&1 || missing="$missing strace"
[ -z "$missing" ] && exit 0

if [ "$(id -u)" = 0 ]; then run=""; elif sudo -n true 2>/dev/null; then run="sudo"; else run="no"; fi
if [ "$run" != no ] && command -v apt-get >/dev/null 2>&1; then
  echo "installing for the tests:$missing"
  # The broker's own service is not wanted: each test starts its broker itself.
  printf '#!/bin/sh\nexit 101\n' | $run tee /usr/sbin/policy-rc.d >/dev/null
  $run chmod +x /usr/sbin/policy-rc.d
  $run apt-get update -qq && $run env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
  status=$?
  $run rm -f /usr/sbin/policy-rc.d
  [ $status = 0 ] && exit 0
fi
echo "The tests need:$missing. Install with: sudo apt-get install$missing" >&2
exit 1
