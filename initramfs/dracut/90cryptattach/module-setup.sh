#!/bin/bash
# dracut's module: puts into the initramfs what `cryptattach boot` needs; cryptattach itself says what that is.
# shellcheck disable=SC2154 # moddir, initdir, dracutbasedir, systemdsystemunitdir, SYSTEMCTL are dracut's

# Of the boots to come, which is not what `cryptattach boot --needs-network` says of this one.
needs_network() { cryptattach boot --image-parts 2>/dev/null | grep -qx network; }

check() {
    # Without a configuration there is nothing to attach, and nothing to say.
    [ -e /etc/cryptattach/cryptattach.toml ] && require_binaries cryptattach || return 1
    cryptattach boot --image-parts >/dev/null || return 1
    if needs_network && ! compgen -G "$dracutbasedir/modules.d/??network" >/dev/null; then
        derror "cryptattach: a key store is on the network, and dracut has no module for it (Debian's package dracut-network)"
        return 1
    fi
}

depends() {
    echo systemd crypt
    ! needs_network || echo network
}

parts() { cryptattach boot --image-parts | sed -nE "s/^($1) //p"; }

installkernel() {
    parts module 2>/dev/null | while read -r module; do instmods "$module"; done
}

install() {
    # The warnings of this one are shown: what is kept out of the image, and why.
    parts "program|library|file" | while read -r path; do inst "$path"; done
    inst_multiple -o systemd-ask-password
    for unit in boot:sysinit root:initrd; do
        inst_simple "$moddir/cryptattach-${unit%:*}.service" "$systemdsystemunitdir/cryptattach-${unit%:*}.service"
        $SYSTEMCTL -q --root "$initdir" add-wants "${unit#*:}.target" "cryptattach-${unit%:*}.service"
    done
    if needs_network; then
        echo rd.neednet=1 >"$initdir/etc/cmdline.d/90-cryptattach.conf"
        inst_simple "$moddir/cryptattach.network" /etc/systemd/network/zzzz-cryptattach.network
    fi
}
