#!/bin/bash
# dracut's module: puts into the initramfs what `cryptattach boot` needs; cryptattach itself says what that is.
# shellcheck disable=SC2154 # moddir, initdir, dracutbasedir, systemdsystemunitdir, SYSTEMCTL are dracut's

check() {
    # Without a configuration there is nothing to attach, and nothing to say.
    [ -e /etc/cryptattach/cryptattach.toml ] || return 1
    require_binaries cryptattach || return 1
    cryptattach boot --image-parts >/dev/null || return 1
    if cryptattach boot --needs-network && ! compgen -G "$dracutbasedir/modules.d/??network" >/dev/null; then
        derror "cryptattach: a key store is on the network, and dracut has no module for it (Debian's package dracut-network)"
        return 1
    fi
}

depends() {
    echo systemd crypt
    ! cryptattach boot --needs-network || echo network
}

parts() {
    cryptattach boot --image-parts 2>/dev/null | sed -n "s/^$1 //p"
}

installkernel() {
    parts module | while read -r module; do
        instmods "$module"
    done
}

install() {
    # The warnings of this one are shown: what is kept out of the image, and why.
    cryptattach boot --image-parts | sed -nE 's/^(program|library|file) //p' | while read -r path; do
        inst "$path"
    done
    inst_multiple -o systemd-ask-password
    for unit in cryptattach-boot.service cryptattach-root.service; do
        inst_simple "$moddir/$unit" "$systemdsystemunitdir/$unit"
    done
    $SYSTEMCTL -q --root "$initdir" add-wants sysinit.target cryptattach-boot.service
    $SYSTEMCTL -q --root "$initdir" add-wants initrd.target cryptattach-root.service
    if cryptattach boot --needs-network; then
        echo rd.neednet=1 >"$initdir/etc/cmdline.d/90-cryptattach.conf"
        # systemd-networkd does not know that word: DHCP, unless ip= or the machine's own files say otherwise.
        mkdir -p "$initdir/etc/systemd/network"
        printf '[Match]\nType=ether\nKind=!*\n\n[Network]\nDHCP=yes\n' >"$initdir/etc/systemd/network/zzzz-cryptattach.network"
    fi
}
