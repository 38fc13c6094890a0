# shellcheck shell=bash
# Which build of PyTorch, and how to get it from whatever index pip is configured with. To be sourced.
: "${venv:?}" "${state:?}" "${requirements:?}"

# find_accelerator: sets TORCH_KIND to cuda where an NVIDIA GPU answers, else cpu. HVDVAE_TORCH overrides, for login nodes.
find_accelerator() {
    TORCH_KIND=${HVDVAE_TORCH:-}
    case $TORCH_KIND in
        cpu | cuda) ;;
        "") if nvidia-smi -L >/dev/null 2>&1; then TORCH_KIND=cuda; else TORCH_KIND=cpu; fi ;;
        *) die "HVDVAE_TORCH is '$TORCH_KIND', expected cpu or cuda (or unset it: an NVIDIA GPU then decides)." ;;
    esac
}

# torch_build: prints version and CUDA version of the installed torch without importing it, as "2.13.0+cpu none"; or nothing.
torch_build() {
    "$venv/bin/python" - <<'PY'
import importlib.metadata, runpy
try:
    version = importlib.metadata.distribution("torch").locate_file("torch/version.py")
    found = runpy.run_path(str(version))
except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
    raise SystemExit from None
print(found["__version__"], found.get("cuda") or "none")
PY
}

# install_torch: installs the pinned torch of TORCH_KIND, unless it is there.
install_torch() {
    local pin version cuda constraints=(-c "$requirements/run.txt" -c "$requirements/build.txt")
    pin=$(pin_of torch)
    read -r version cuda <<<"$(torch_build)" || true
    if [[ ${version%%+*} == "${pin#torch==}" ]] && { [[ $TORCH_KIND == cpu ]] || [[ $cuda != none ]]; }; then
        return
    fi
    echo "install: installing $pin for $TORCH_KIND"
    if [[ $TORCH_KIND == cuda ]]; then
        # Three equals signs: plain == would prefer 2.13.0+cpu where pip is offered both.
        pip_install "${constraints[@]}" "${pin/==/===}" || pip_install "${constraints[@]}" "$pin" ||
            die "no CUDA build of $pin for this Python. Set HVDVAE_TORCH=cpu for the CPU build."
        read -r version cuda <<<"$(torch_build)"
        [[ $cuda != none ]] || echo "install: note: pip gave torch $version, which is no CUDA build: the GPU will not be used"
        return
    fi
    if "$venv/bin/pip" install --dry-run --quiet --no-deps "$pin+cpu" >/dev/null 2>&1; then
        pip_install "$pin+cpu" "${constraints[@]}"
    elif install_torch_with_uv "$pin" "${constraints[@]}"; then
        :
    else
        echo "install: note: no CPU build of $pin is to be had here: taking the default one, which may bring GBs of CUDA"
        pip_install "$pin" "${constraints[@]}"
    fi
}

# install_torch_with_uv PIN OPTIONS...: uv knows where PyTorch keeps its CPU builds.
install_torch_with_uv() {
    local tool=$state/uv status=0
    echo "install: pip finds no $1+cpu: asking uv"
    "$venv/bin/pip" install --quiet --target "$tool" --upgrade "$(pin_of uv)" >/dev/null 2>&1 &&
        "$tool/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend=cpu "$@" \
            2>"$state/uv.log" || status=1
    rm -rf "$tool"
    return "$status"
}
